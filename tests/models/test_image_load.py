import pytest
import torch
from PIL import Image

from conftest import config_for
from forgebook.models.families import tower_modules
from forgebook.models.image_load import with_images
from forgebook.models.load import load_model, load_skeleton
from forgebook.models.processor import load_processor
from forgebook.models.shapes import find_shape
from forgebook.models.tokenizer import load_tokenizer
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
    assert (frozen.layers, frozen.hidden) == (2, 32)
    assert frozen.patches == pytest.approx(100 / FAMILIES[family]["tower"]["patch_size"] ** 2)
    assert encoder.flops_per_token == pytest.approx(3 * frozen.flops_per_token) and frozen.flops_per_token > 0


def test_another_task_has_no_images():
    shape = find_shape("tiny")
    assert with_images(shape, config_for("tiny"), 100.0) is shape


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_for_its_backward_pass_what_is_counted(family, tmp_path):
    source = save_vision_model(family, tmp_path)
    images = {"vision_language_config": {"freeze_vision_encoder": False}}
    processor = load_processor(source, load_tokenizer(source))
    picture = Image.new("RGB", (84, 84), "white")
    inputs = processor(images=[[picture]], text=[processor.image_token], return_tensors="pt")
    named = {key: value for key, value in inputs.items() if key.startswith(("pixel", "image_"))}
    load = with_images(find_shape(source), config_for(source, **images), named["pixel_values"].numel()).images
    patches = named["pixel_values"].numel() / load.pixels
    model = load_model(source, dtype="float32", attention="sdpa").train()
    kept, before = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return tensor

    def begin(module, args, kwargs):  # positions, which all layers share, are no layer's own
        shared = [value for value in kwargs.get("position_embeddings") or () if torch.is_tensor(value)]
        before.update(one.untyped_storage().data_ptr() for one in shared)
        hooks.__enter__()

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    lists = [one for name in tower_modules(model) for one in model.get_submodule(name).modules()]
    layer = next(one[0] for one in lists if isinstance(one, torch.nn.ModuleList) and len(one) == 2)
    layer.register_forward_pre_hook(begin, with_kwargs=True)
    layer.register_forward_hook(lambda *_: hooks.__exit__(None, None, None))
    model.get_image_features(**named)
    numbers = sum(one.nbytes() // 4 for address, one in kept.items() if address not in before) / patches
    assert numbers == pytest.approx(load.kept, rel=0.12)
