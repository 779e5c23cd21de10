"""Model architectures, one a file; importing this package or its `config` doesn't import torch."""
