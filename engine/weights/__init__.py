"""Where weights come from: model directories, safetensors, GGUF, random numbers."""
