"""The names of the files in a model's folder, in lmx's own format and in Hugging Face's."""

STRUCTURE, CONFIG, INDEX = "structure.json", "config.json", "model.safetensors.index.json"
GENERATION = "generation_config.json"
# A tokenizer, its chat template, and what travels with it: all text.
TOKENIZER_TEXTS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", GENERATION,
)  # fmt: skip
# The others say once more, to other tools, what is in tokenizer.json.
TOKENIZER_FILES = (
    *TOKENIZER_TEXTS, "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "source.spm",
    "target.spm", "sentencepiece.bpe.model",
)  # fmt: skip
