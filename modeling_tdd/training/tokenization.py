# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Trains a tokenizer on the words or subwords of a set of captions, with `tokenizers`."""

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


SPECIAL_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]", "mask_token": "[MASK]"}
# A word or a punctuation mark with the space in front of it, which has become "▁" at that point.
TOKEN_PATTERN = r"▁?\w+|▁?[^\w▁]"


def train_tokenizer(
    captions: Sequence[str], kind: str = "word", vocab_size: int | None = None, lower_case: bool | None = None
) -> PreTrainedTokenizerFast:
    r"""
    Trains a tokenizer whose decoding restores captions exactly. `[PAD]` is token 0, followed by `[UNK]`, `[EOS]` and
    `[MASK]`, none of which it adds to a text. A `[MASK]` in a text replaces a word and the space in front of it.

    Args:
        captions (`Sequence[str]`): Training captions.
        kind (`str`): `"word"`: tokens are words and punctuation marks, unknown words `[UNK]`. `"bpe"`: subwords.
        vocab_size (`int`, *optional*): Number of tokens, special ones included. By default all words, or 8,192.
        lower_case (`bool`, *optional*): Whether to lower-case texts. By default only if all captions are lower case.

    Raises:
        `ValueError`: for an unknown kind, no captions, or a vocabulary that is too small to hold a word.
    """
    if kind not in ("word", "bpe"):
        raise ValueError(f"`kind` must be 'word' or 'bpe', got {kind!r}.")
    if not captions:
        raise ValueError("`captions` must hold at least one caption, got none.")
    if vocab_size is not None and vocab_size <= len(SPECIAL_TOKENS):
        raise ValueError(f"`vocab_size` must be above {len(SPECIAL_TOKENS)}, the special tokens, got {vocab_size}.")
    lower_case = all(caption == caption.lower() for caption in captions) if lower_case is None else lower_case
    specials = [AddedToken(token, lstrip=token == "[MASK]", special=True) for token in SPECIAL_TOKENS.values()]
    if kind == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        every_word = sum(len(caption) for caption in captions) + len(specials)  # an upper bound
        trainer = trainers.WordLevelTrainer(vocab_size=vocab_size or every_word, special_tokens=specials)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=vocab_size or 8192, special_tokens=specials)
    # Decoding cannot undo the normaliser, which composes characters, makes spaces single and may lower the case.
    case = [normalizers.Lowercase()] if lower_case else []
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), *case])
    spaces = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # the first word is like any other
    words = pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([spaces, words])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL_TOKENS,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
