"""How good predictions are, by scikit-learn."""

import warnings
from collections.abc import Sequence


def classification_metrics(labels: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """Accuracy, F1 (mean over the labels that occur) and Matthews correlation.

    Args:
        labels: the right label of each text.
        predicted: the predicted one.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef  # seconds to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label that is never predicted has an F1 of 0: that is meant
        return {
            "accuracy": float(accuracy_score(labels, predicted)),
            "f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
            "mcc": float(matthews_corrcoef(labels, predicted)),
        }
