"""Trains the judge: a small audio spectrogram transformer, on real clips only, for instrument and mood bins.

Its 72 classes are the eight instruments times the nine mood bins; `evaluate.py` computes KL and FD with it.
"""

import torch
from contrastive import mood_labels
from corpus import load_features, read_rows
from music import INSTRUMENTS, SAMPLING_RATE
from torch.nn import functional as F
from training_loop import Training, run, stage_parser
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

MOODS = 9
FRAMES = 512


def create_classifier() -> ASTForAudioClassification:
    """Returns a transformer of three layers on patches of 16 mel bands x 16 frames."""
    labels = [f"{instrument}, mood {mood}" for instrument in INSTRUMENTS for mood in range(MOODS)]
    config = ASTConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=384,
        patch_size=16,
        frequency_stride=16,
        time_stride=16,
        max_length=FRAMES,
        num_mel_bins=64,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    return ASTForAudioClassification(config)


def create_feature_extractor() -> ASTFeatureExtractor:
    """Returns the input of the classifier: 512 frames (5.12 s) of 64 mel bands."""
    return ASTFeatureExtractor(sampling_rate=SAMPLING_RATE, num_mel_bins=64, max_length=FRAMES)


def labels_of(rows: list[dict]) -> torch.Tensor:
    """Returns the index of each row's instrument and mood bin among the 72 classes."""
    instruments = torch.tensor([list(INSTRUMENTS).index(row["instrument"]) for row in rows])
    return instruments * MOODS + mood_labels(rows)


def marginals(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the log-probabilities `[B, 8]` of the instruments and `[B, 9]` of the mood bins."""
    joint = logits.log_softmax(dim=-1).unflatten(-1, (len(INSTRUMENTS), MOODS))
    return joint.logsumexp(dim=2), joint.logsumexp(dim=1)


@torch.no_grad()
def heard_right(
    classifier: ASTForAudioClassification, features: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns, clip by clip, whether the instrument and whether the mood bin is told right, `[N]` each."""
    logits = torch.cat([classifier(batch.float()).logits for batch in features.split(32)])
    truth = (labels // MOODS, labels % MOODS)
    return tuple(told.argmax(dim=1) == true for told, true in zip(marginals(logits), truth, strict=True))


def main() -> None:
    args = stage_parser(__doc__, steps=1000, batch_size=32, learning_rate=1e-3).parse_args()
    torch.manual_seed(args.seed)
    classifier, extractor = create_classifier(), create_feature_extractor()
    splits = ("train", "validation")
    features, unseen = (load_features(args, split, extractor, "input_values") for split in splits)
    labels, unseen_labels = (labels_of(read_rows(args.data, split)) for split in splits)
    training = Training(classifier, args.output / "state/classifier.safetensors", args)

    def take_step(generator: torch.Generator) -> dict[str, torch.Tensor]:
        batch = torch.randint(len(features), (args.batch_size,), generator=generator)
        instruments, moods = marginals(classifier(features[batch].float()).logits)
        losses = {
            "instrument": F.nll_loss(instruments, labels[batch] // MOODS),
            "mood": F.nll_loss(moods, labels[batch] % MOODS),
        }
        training.update(losses["instrument"] + losses["mood"])
        return losses

    done = run(training, take_step)
    training.use_average()
    folder = args.output / "components/classifier"
    classifier.save_pretrained(folder)
    extractor.save_pretrained(folder)
    instrument, mood = (right.float().mean() for right in heard_right(classifier, unseen, unseen_labels))
    print(f"{'done' if done else 'stopped'}: validation accuracy, instrument {instrument:.3f}, mood bin {mood:.3f}")


if __name__ == "__main__":
    main()
