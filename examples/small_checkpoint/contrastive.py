"""What CLIP and CLAP training share: the loss with several positives, mood labels, and tokenizers of our own texts."""

from collections.abc import Callable

import torch
from mood import MOOD_SENTENCES, mood_bin
from torch.nn import functional as F


def contrastive_loss(
    left: torch.Tensor, right: torch.Tensor, left_labels: torch.Tensor, right_labels: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """CLIP's symmetric loss, where every pair of one label is a positive: few distinct texts serve many samples.

    Args:
        left, right: unit embeddings `[B, D]` and `[C, D]`.
        left_labels, right_labels: what each shows or says, `[B]` and `[C]`.
        scale: of the similarities.

    Returns:
        The mean cross-entropy in both directions; a row without a positive counts as zero.
    """
    positive = (left_labels[:, None] == right_labels[None]).float()
    logits = scale * left @ right.mT
    forward, backward = (pairs / pairs.sum(dim=1, keepdim=True).clamp(min=1) for pairs in (positive, positive.mT))
    return (F.cross_entropy(logits, forward) + F.cross_entropy(logits.mT, backward)) / 2


def mood_texts() -> tuple[list[str], torch.Tensor]:
    """Returns all mood sentences and each one's bin, 0 to 8."""
    bins = [(3 * row + column, text) for (row, column), texts in MOOD_SENTENCES.items() for text in texts]
    return [text for _, text in bins], torch.tensor([label for label, _ in bins])


def mood_labels(rows: list[dict]) -> torch.Tensor:
    """Returns each row's mood bin, 0 to 8, row by row of the table in `mood.py`."""
    bins = (mood_bin(row["arousal"], row["valence"]) for row in rows)
    return torch.tensor([3 * row + column for row, column in bins])


def retrieval_accuracy(embeds: torch.Tensor, labels: torch.Tensor, embed_texts: Callable) -> float:
    """Returns how often an embedding's nearest mood bin is its own; a bin is the mean of its sentences' embeddings."""
    texts, bins = mood_texts()
    sentences = embed_texts(texts)
    means = torch.stack([sentences[bins == label].mean(dim=0) for label in range(9)])
    return ((embeds @ means.mT).argmax(dim=1) == labels).float().mean().item()


def train_tokenizer(tokenizer_class, texts: list[str], vocabulary_size: int, max_tokens: int):
    """Returns a byte-level BPE tokenizer of `tokenizer_class`, with its special tokens, trained on `texts`."""
    tokenizer = tokenizer_class().train_new_from_iterator(texts, vocab_size=vocabulary_size, show_progress=False)
    tokenizer.model_max_length = max_tokens
    return tokenizer
