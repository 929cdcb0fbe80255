"""An edited model for other programs: a Hugging Face folder, a PEFT adapter, or the change alone."""
