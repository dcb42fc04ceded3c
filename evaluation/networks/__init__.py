"""Networks behind extractors, as pure PyTorch with the parameter names of their published weights."""
