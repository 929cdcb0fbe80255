"""Exports an edited model as a Hugging Face folder, a PEFT adapter, or a file of the changes."""
