import numpy as np
import pytest
import torch

from llmtrain.config import decode, encode
from llmtrain.corpus.config import ImageDataConfig, TokenDataConfig
from llmtrain.models.convolutional.config import SimpleCNNConfig
from llmtrain.models.convolutional.model import SimpleCNN
from llmtrain.nn.initialize import initialize
from llmtrain.objectives.image_classification import ImageClassification, ImageClassificationConfig
from llmtrain.objectives.reading import data_section


@pytest.fixture
def model() -> SimpleCNN:
    model = SimpleCNN(SimpleCNNConfig())
    initialize(model, seed=1)
    return model.eval()


def raw(labels: list[int]) -> dict[str, np.ndarray]:
    images = np.random.default_rng(0).standard_normal((len(labels), 1, 28, 28)).astype(np.float32)
    return {"images": images, "labels": np.array(labels, dtype=np.int64)}


def test_training_and_evaluation_agree_on_the_loss(model: SimpleCNN):
    objective = ImageClassification()
    batch = objective.collate(raw([3, 1, 4, 1, 5]))
    with torch.no_grad():
        trained, evaluated = objective(model, batch), objective.evaluate(model, batch)
    assert trained.num_targets == evaluated.num_targets == objective.target_count(batch) == 5
    assert trained.loss_sum.dtype == torch.float32
    assert float(trained.loss_sum) > 0
    torch.testing.assert_close(trained.loss_sum, evaluated.loss_sum)


def test_accuracy_counts_correct_predictions(model: SimpleCNN):
    objective = ImageClassification()
    sample = raw([0, 0, 0, 0])
    with torch.no_grad():
        best = model(torch.from_numpy(sample["images"])).argmax(dim=-1).numpy()
        right, wrong = best.copy(), (best + 1) % 10
        for labels, expected in ((right, 4), (wrong, 0), (np.where([1, 0, 1, 0], right, wrong), 2)):
            terms = objective.evaluate(model, objective.collate(sample | {"labels": labels}))
            assert terms.metrics["accuracy"].tolist() == [expected, 4]


def test_empty_samples_add_nothing(model: SimpleCNN):
    objective = ImageClassification()
    sample = raw([3, 1, 4])
    filled = objective.collate(sample | {"labels": np.array([3, 1, -1])})
    alone = objective.collate({name: value[:2] for name, value in sample.items()})
    with torch.no_grad():
        expected = objective.evaluate(model, alone)
        for found in (objective(model, filled), objective.evaluate(model, filled)):
            assert found.num_targets == 2
            torch.testing.assert_close(found.loss_sum, expected.loss_sum)
    assert objective.target_count(filled) == 2


def test_other_files_take_the_place_of_those_of_the_run() -> None:
    """`llmtrain evaluate checkpoint=… data.path=…`, whose other keys are those of token data."""
    recorded = encode(ImageDataConfig(path="run.npz", mean=(0.5,)))
    section = {**encode(TokenDataConfig()), "path": "other.npz", "resize": False}
    described = data_section(section, ImageClassificationConfig(), recorded)
    expected = ImageDataConfig(path="other.npz", mean=(0.5,), resize=False)
    assert decode(ImageDataConfig, described) == expected
