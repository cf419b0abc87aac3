from conftest import config_for
from forgebook.config.image_limits import IMAGE_LIMITS
from forgebook.config.rules import broken_rules


def test_a_config_with_images_breaks_none_of_them_by_default():
    for values in ({}, {"lora_config": {"r": 8}}, {"vision_language_config": {"train_projector": True}}):
        assert broken_rules(config_for("org/model", **{"vision_language_config": {}, **values})) == []


def test_they_are_rows_of_the_table_only_where_there_are_images():
    messages = {message for _, _, message, _ in IMAGE_LIMITS}
    packed = config_for("org/model", padding="packed")
    assert messages.isdisjoint(rule.message for rule in broken_rules(packed))
    images = config_for("org/model", padding="packed", vision_language_config={})
    assert {rule.message for rule in broken_rules(images)} == {"padding: packed does not pack examples with images"}


def test_answers_during_training_would_see_no_images():
    answers = config_for("org/model", vision_language_config={}, eval_generation={"prompts": 2})
    assert ("vision_language_config", "eval_generation") in [rule.keys for rule in broken_rules(answers)]
