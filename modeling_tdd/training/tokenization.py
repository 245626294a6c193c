# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""A tokenizer of a caption set's own words or pieces, through `tokenizers`."""

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


SPECIAL_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]", "mask_token": "[MASK]"}
DEFAULT_BPE_SIZE = 8192
# A word or a punctuation mark, with the space in front of it, which is "▁" by then.
TOKEN_PATTERN = r"▁?\w+|▁?[^\w▁]"


def train_tokenizer(
    captions: Sequence[str], kind: str = "word", vocab_size: int | None = None, lower_case: bool | None = None
) -> PreTrainedTokenizerFast:
    r"""
    Trains a tokenizer whose decoding gives captions back exactly, spaces and punctuation included.

    `[PAD]` is token 0, then come `[UNK]`, `[EOS]` and `[MASK]`. None is added to a caption: a prompt has no end. A
    `[MASK]` in a text takes the place of a word with the space in front of it.

    Args:
        captions (`Sequence[str]`): Training captions.
        kind (`str`, *optional*, defaults to `"word"`):
            `"word"`: words and punctuation marks, other words are `[UNK]`. `"bpe"`: pieces of them.
        vocab_size (`int`, *optional*): Size with the special tokens. By default all words, or 8,192 pieces.
        lower_case (`bool`, *optional*): Whether to lower-case texts. By default, where all captions are lower case.

    Raises:
        `ValueError`: for an unknown kind, no captions, or a vocabulary without room for a word.

    Example:

    ```python
    >>> tokenizer = train_tokenizer(["woman firefighter: medium-light skin tone"])
    >>> tokenizer.tokenize("woman: light skin tone")
    ['▁woman', ':', '[UNK]', '▁skin', '▁tone']
    ```"""
    if kind not in ("word", "bpe"):
        raise ValueError(f"`kind` must be 'word' or 'bpe', got {kind!r}.")
    if not captions:
        raise ValueError("`captions` must hold at least one caption, got none.")
    if vocab_size is not None and vocab_size <= len(SPECIAL_TOKENS):
        raise ValueError(f"`vocab_size` must be above {len(SPECIAL_TOKENS)}, the special tokens, got {vocab_size}.")
    if lower_case is None:
        lower_case = all(caption == caption.lower() for caption in captions)
    specials = [AddedToken(token, lstrip=token == "[MASK]", special=True) for token in SPECIAL_TOKENS.values()]
    if kind == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        every_word = sum(len(caption) for caption in captions) + len(specials)  # an upper bound
        trainer = trainers.WordLevelTrainer(vocab_size=vocab_size or every_word, special_tokens=specials)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=vocab_size or DEFAULT_BPE_SIZE, special_tokens=specials)
    # What the normaliser changes is lost: composed characters, single spaces, and lower case where all is.
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " ")]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Lowercase()] if lower_case else steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first", split=False),  # the first word is like any other
            pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(captions, trainer, length=len(captions))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL_TOKENS,
        padding_side="right",
        truncation_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
