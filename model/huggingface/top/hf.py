"""Register Headway's models with Hugging Face transformers, under the name `headway.hf`.

    import headway.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("FOLDER")  # written by `headway export RUN FOLDER --to hf`
    tokenizer = AutoTokenizer.from_pretrained("FOLDER")

Importing this module has the effect; no code is read from the folder (`headway.model.huggingface.auto`). Raises
ImportError, with the command that installs it, if transformers is missing.
"""

from headway.model.huggingface.auto import HeadwayCache, HeadwayConfig, HeadwayForCausalLM

__all__ = ["HeadwayCache", "HeadwayConfig", "HeadwayForCausalLM"]
