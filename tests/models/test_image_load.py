import pytest

from conftest import config_for
from forgebook.models.families import tower_modules
from forgebook.models.image_load import with_images
from forgebook.models.load import load_skeleton
from forgebook.models.shapes import find_shape
from support_vision import FAMILIES, save_vision_model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parameters_that_train_are_counted_on_the_class(family, tmp_path):
    source = save_vision_model(family, tmp_path)
    model = load_skeleton(source)
    whole = sum(p.numel() for name in tower_modules(model) for p in model.get_submodule(name).parameters())

    def load(**images):
        return with_images(find_shape(source), config_for(source, vision_language_config=images), 100.0).images

    frozen, projector, encoder = load(), load(train_projector=True), load(freeze_vision_encoder=False)
    assert (frozen.parameters, frozen.trained, encoder.trained) == (whole, 0, whole)
    assert 0 < projector.trained < whole and projector.is_frozen and not encoder.is_frozen
    assert (frozen.layers, frozen.hidden, frozen.inner) == (2, 32, 64)
    assert frozen.patches == pytest.approx(100 / FAMILIES[family]["tower"]["patch_size"] ** 2)
    assert encoder.flops_per_token == pytest.approx(3 * frozen.flops_per_token) and frozen.flops_per_token > 0


def test_another_task_has_no_images():
    shape = find_shape("tiny")
    assert with_images(shape, config_for("tiny"), 100.0) is shape
