"""The operations of a transformer step: a checked wrapper and a torch reference each.

A wrapper picks the implementation by device and dtype: native C on CPU where it was built, the
torch reference everywhere else.
"""
