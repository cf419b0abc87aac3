import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forgebook.config.data_block import DataSource
from forgebook.data.examples import read_examples
from forgebook.data.image_parts import image_base, image_count
from forgebook.data.images import IMAGE, Image
from forgebook.data.row_formats import parse_row
from forgebook.errors import DataError

A = {"role": "assistant", "content": "A"}
TEXT = {"type": "text", "text": "What?"}


def user(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, A]}


def sharegpt(text, answer="A", **beside):
    return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": answer}], **beside}


FORMS = {
    "openai": (user({"type": "image_url", "image_url": {"url": "a.png"}}, TEXT), f"{IMAGE}What?"),
    "openai, a text": (user({"type": "image_url", "image_url": "a.png"}, TEXT), f"{IMAGE}What?"),
    "responses": (user({"type": "input_image", "image_url": "a.png"}, TEXT), f"{IMAGE}What?"),
    "path": (user(TEXT, {"type": "image", "image": "a.png"}), f"What?{IMAGE}"),
    "url": (user({"type": "image", "url": "a.png"}, TEXT), f"{IMAGE}What?"),
    "beside": (user({"type": "image"}, TEXT) | {"images": ["a.png"]}, f"{IMAGE}What?"),
    "llava": (sharegpt("<image>\nWhat?", image="a.png"), f"{IMAGE}\nWhat?"),
    "sharegpt": (sharegpt("See <image>.", images=["a.png"]), f"See {IMAGE}."),
    "no placeholder": (sharegpt("What?", images=["a.png"]), f"{IMAGE}What?"),
    "alpaca": ({"instruction": "<image>What?", "output": "A", "images": ["a.png"]}, f"{IMAGE}What?"),
    "prompt": ({"prompt": "<image>What?", "completion": "A", "image": "a.png"}, f"{IMAGE}What?"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_image_is_read(form):
    raw, content = FORMS[form]
    example, notes = parse_row(raw, "f:1", "vision_language", base="/data")
    assert example.messages[0]["content"] == content and example.messages[0]["images"] == [Image("/data/a.png")]
    assert image_count(example.messages) == 1 and notes.ignored == ()
    with pytest.raises(DataError, match="reads text alone") if form != "no placeholder" else does_not_raise():
        assert parse_row(raw, "f:1", "instruction_tuning")[1].ignored == ("images",)


class does_not_raise:
    def __enter__(self):
        pass

    def __exit__(self, *error):
        return False


def test_many_images_keep_their_order():
    raw = sharegpt("<image> or <image>?", images=["a.png", {"bytes": b"xy", "path": "b.png"}])
    example, _ = parse_row(raw, "f:1", "vision_language", base="/data")
    assert example.messages[0]["images"] == [Image("/data/a.png"), Image("b.png", b"xy")]
    raw = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, TEXT]}, A,
            {"role": "user", "content": [TEXT, {"type": "image", "image": "b.png"}]}, A,
        ]
    }  # fmt: skip
    messages = parse_row(raw, "f:1", "vision_language", base="/d")[0].messages
    assert [message.get("images") for message in messages] == [[Image("/d/a.png")], None, [Image("/d/b.png")], None]


WRONG = [
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [TEXT, {"type": "image",
      "image": "a.png"}]}]}, r"f:1: messages\[1\]: an image in a turn of the assistant"),
    ({"messages": [{"role": "system", "content": [{"type": "image", "image": "a.png"}]}, *user(TEXT)["messages"]]},
     r"messages\[0\]: an image in a turn of the system"),
    (user({"type": "image"}, TEXT), r"messages\[0\].content\[0\]: image 1 of 1 is missing, the row holds none"),
    (sharegpt("<image>What?"), r"messages\[0\].content: image 1 of 1 is missing"),
    (sharegpt("<image><image>?", images=["a.png"]), "image 2 of 2 is missing, images holds 1"),
    (sharegpt("<image>?", images=["a.png", "b.png"]), "images holds 2 images, and the messages mention 1"),
    (sharegpt("<image>?", "<image>", images=["a.png", "b.png"]), r"messages\[1\]: an image in a turn of the assistant"),
    (sharegpt("?", images=["a.png"], image="b.png"), "images and image both hold images"),
    (user({"type": "image_url", "image_url": {"url": ""}}), r"content\[0\].image_url is {\"url\": \"\"}"),
    (user({"type": "image", "image": "a.png"}, {"type": "text", "text": "<image>"}) | {"images": ["b.png"]},
     "both <image> and image parts"),
    ({"messages": [{"role": "user", "content": "q", "images": ["a.png"]}, A]}, "write each image as a part"),
    (sharegpt(f"a {IMAGE}", images=["a.png"]), "U\\+FDD0, which is no character"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "message"), WRONG, ids=[message for _, message in WRONG])
def test_an_image_in_the_wrong_place_is_an_error(raw, message):
    with pytest.raises(DataError, match=message):
        parse_row(raw, "f:1", "vision_language", base="/data")


def test_relative_paths_begin_at_the_folder_of_the_data(tmp_path):
    assert image_base(str(tmp_path / "rows.jsonl")) == str(tmp_path)
    assert image_base("s3://bucket/set/rows.jsonl") == "s3://bucket/set"
    assert image_base("hf://owner/set:train") is None


def test_a_column_of_images_can_be_mapped(tmp_path):
    """As a set of questions about documents on the hub: question, answer, and the hub's image feature."""
    pq.write_table(
        pa.table({"query": ["What?"], "reply": ["A"], "page": [{"bytes": b"xy", "path": "p.png"}], "id": [7]}),
        tmp_path / "rows.parquet",
    )
    columns = {"user": "query", "assistant": "reply", "images": "page"}
    [example] = read_examples(DataSource(path=str(tmp_path / "rows.parquet"), columns=columns), "vision_language")
    assert example.messages[0] == {"role": "user", "content": f"{IMAGE}What?", "images": [Image("p.png", b"xy")]}
    columns["images"] = "scans/{id}.png"
    [example] = read_examples(DataSource(path=str(tmp_path / "rows.parquet"), columns=columns), "vision_language")
    assert example.messages[0]["images"] == [Image(f"{tmp_path}/scans/7.png")]
