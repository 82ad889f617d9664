"""Export: a model or adapter as a GGUF file for llama.cpp and Ollama, or as a Hugging Face folder."""
