"""The names of the files in a model's folder, in lmx's own format and in Hugging Face's."""

STRUCTURE, CONFIG, INDEX = "structure.json", "config.json", "model.safetensors.index.json"
GENERATION = "generation_config.json"
# What belongs to a tokenizer, and what travels with it.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "source.spm",
    "target.spm", "sentencepiece.bpe.model", GENERATION,
)  # fmt: skip
