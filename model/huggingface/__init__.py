"""Hugging Face forms: folders of safetensors, Llama names and configurations."""
