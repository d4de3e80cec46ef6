"""Where model folders come from: a known small model, a local folder, or the Hugging Face hub."""
