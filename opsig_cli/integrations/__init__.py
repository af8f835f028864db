"""Recording from other people's trainers: a callback for Hugging Face's Trainer and one for Lightning's.

Each module is imported by its name, `opsig_cli.integrations.huggingface` or `.lightning`, and needs that library.
"""
