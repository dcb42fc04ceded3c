"""Data: storage paths, image sources, image operations, tokenization on Ray Data, the code-dataset format and its order."""
