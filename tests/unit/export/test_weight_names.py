"""Names of weights in files and in memory, for both directions."""

from finetune.export.weight_names import WeightNames
from tests.helpers import tiny_models


def test_weights_are_stored_under_the_prefix_of_their_files():
    """Those of a text model of Qwen3.5-MoE may have the prefix of the whole model; its experts are a tensor each."""
    model = tiny_models.build("qwen3_5_moe")
    own = WeightNames(model).as_stored(model.state_dict())
    for prefix in ("model.", "model.language_model."):
        shapes = {name.replace("model.", prefix, 1): weight.shape for name, weight in own.items()}
        names = WeightNames(model)
        names.group_files(shapes)
        assert {name: weight.shape for name, weight in names.as_stored(names.state).items()} == shapes
