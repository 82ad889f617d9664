"""Original LLaMA `.pth` folders and Hugging Face folders, each made from the other."""
