# The part of UCXX 0.52 that kvtransfer uses; UCXX ships no types for it.

from ucxx._lib import libucxx as libucxx
