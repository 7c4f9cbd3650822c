"""Objects as tokens: the original's rules by hand, files, crops and flips, windows, pictures, and errors."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tamingfast import UserError
from tamingfast.data import build, loader
from tamingfast.data.conditions import label_colors, make, scenes
from tamingfast.data.conditions.scenes import Rule, Scene, Thing

NAMES = tuple(f"class{number}" for number in range(80))
#: The original's config for COCO: a codebook of 8192, so 90 x 90 positions, up to 30 objects and the crop.
COCO = Rule(NAMES, 8192, attributes=("group",))
THING = Thing(5, (0.1, 0.2, 0.3, 0.4))
THING_OF_ALL = Thing(0, scenes.WHOLE)


def test_positions_as_in_the_originals_example():
    rule = Rule(("a",), 16)
    assert rule.position(2 / 3, 1 / 3) == 6 and rule.position(1, 1) == 15
    assert rule.place(6) == pytest.approx((2 / 3, 1 / 3)) and rule.place(0) == (0, 0)


def test_boxes_by_hand():
    # round(0.1 * 89) = 9, round(0.2 * 89) = 18, 18 * 90 + 9 = 1629; the other corner 53 * 90 + 36 = 4806
    tokens = COCO.encode([THING], (0.25, 0, 0.75, 1))
    assert len(tokens) == COCO.length == 92 and tokens.dtype == np.int64
    assert tokens[:3].tolist() == [5, 1629, 4806] and tokens[-2:].tolist() == [22, 8099]
    assert (tokens[3:-2] == 8191).all()


def test_mirrored_boxes_by_hand():
    tokens = COCO.encode([dataclasses.replace(THING, attributes=("group", "inside"))], (0.25, 0, 0.75, 1), True)
    assert tokens[:3].tolist() == [5 + 80, 1673, 4850]  # "inside" is not encoded
    assert tokens[-2:].tolist() == [0, 8077]


def test_centres_by_hand():
    rule = dataclasses.replace(COCO, corners=False)
    tokens = rule.encode([THING, Thing(79, (0.5, 0.5, 0.5, 0.5))])
    assert rule.length == 62 and tokens[:4].tolist() == [5, 3262, 79, 67 * 90 + 67]
    assert tokens[-2:].tolist() == [0, 8099] and (tokens[4:-2] == 8191).all()


def test_without_the_crop_boxes_are_cut_at_its_border():
    rule = dataclasses.replace(COCO, crop_tokens=False)
    tokens = rule.encode([THING, Thing(1, (0.8, 0, 0.2, 1))], (0.25, 0, 0.5, 1))
    # from 0.25 to 0.4 of the picture, so from 0 to 0.3 of the crop; the second is not in it
    assert len(tokens) == rule.length == 90 and tokens[:3].tolist() == [5, 1620, 4797] and (tokens[3:] == 8191).all()


def test_of_too_many_the_largest_are_kept_in_their_order():
    rule = Rule(NAMES, 8192, objects=2)
    things = [Thing(n, (0.1, 0.1, side, side)) for n, side in enumerate((0.3, 0.1, 0.2))]
    assert rule.encode(things)[::3][:2].tolist() == [0, 2]
    # What the crop does not show does not count.
    assert rule.encode([Thing(7, (0.9, 0.9, 0.05, 0.05)), *things], (0.85, 0.85, 0.15, 0.15))[0] == 7


@settings(deadline=None)
@given(st.data())
def test_what_is_encoded_comes_back(data):
    size, corners, crop = data.draw(st.tuples(st.integers(9, 2000), st.booleans(), st.booleans()))
    rule = Rule(("a", "b"), size, 4, corners, crop, ("occluded",) if size > 9 else ())
    share = st.integers(0, rule.sections - 1).map(lambda n: n / (rule.sections - 1))
    things = []
    for _ in range(data.draw(st.integers(0, 4))):
        left, right = sorted(data.draw(st.tuples(share, share).filter(lambda pair: pair[0] != pair[1])))
        top, bottom = sorted(data.draw(st.tuples(share, share).filter(lambda pair: pair[0] != pair[1])))
        held = data.draw(st.sampled_from([(), rule.attributes]))
        things.append(Thing(data.draw(st.integers(0, 1)), (left, top, right - left, bottom - top), held))
    tokens = rule.encode(things)
    assert tokens.min() >= 0 and tokens.max() < size
    found, region = rule.decode(tokens)
    assert [(one.label, one.attributes) for one in found] == [(one.label, one.attributes) for one in things]
    assert region == (scenes.WHOLE if crop else None)
    for one, thing in zip(found, things, strict=True):
        if corners:
            assert one.box == pytest.approx(thing.box)
        else:
            middle = [thing.box[i] + thing.box[i + 2] / 2 for i in range(2)]
            assert one.box[:2] == pytest.approx(middle, abs=0.51 / (rule.sections - 1)) and one.box[2:] == (0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 160}, "tokens: got 160, expected at least 161 for 80 classes with 1 attributes"),
        ({"attributes": ("ocluded",)}, "attributes: got 'ocluded', expected .*; did you mean 'occluded'"),
    ],
)
def test_rules_that_cannot_be(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(COCO, **change)


# --- files ----------------------------------------------------------------------------------------------------------

CLASSES = ["cat", "dog"]
GOOD = {"width": 200, "height": 100, "objects": [{"class": "dog", "box": [20, 10, 100, 50], "group": True}]}


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def changed(**values):
    return GOOD | {"objects": [GOOD["objects"][0] | values]}


def test_a_file_is_read(tmp_path):
    scene = scenes.read(written(tmp_path / "a.json", GOOD), Rule(("cat", "dog"), 64))
    assert scene == Scene((Thing(1, (0.1, 0.1, 0.5, 0.5), ("group",)),), (100, 200))
    # A pixel over the border is what COCO's own boxes do.
    scene = scenes.read(written(tmp_path / "b.json", changed(box=[-0.5, 0, 200.9, 100])), Rule(("cat", "dog"), 64))
    assert scene.things[0].box == (0, 0, 1, 1)
    assert scenes.read(written(tmp_path / "n.json", changed(id=7)), Rule(("cat", "dog"), 64)).things  # a note
    centre = changed(box=None, center=[50, 25])
    scene = scenes.read(written(tmp_path / "c.json", centre), Rule(("cat", "dog"), 64, corners=False))
    assert scene.things[0].box == pytest.approx((0.2475, 0.245, 0.005, 0.01))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read .* expected JSON"),
        ([], 'without the list "objects"'),
        ({"objects": []}, "got width None and height None"),
        (
            changed(**{"class": "dgo"}),
            "got object 0 of class 'dgo', expected one of the 2 known classes .*; did you mean 'dog'",
        ),
        (changed(**{"class": 7}), r"class '7', expected one of the 2 known classes \(cat, dog\)"),
        (GOOD | {"objects": [[1, 2]]}, 'got object 0 without "class"'),
        (
            changed(box=[0, 0, 0, 5]),
            r"got object 0 with the box \[0, 0, 0, 5\], expected \[x, y, width, height\] in pixels",
        ),
        (changed(box=[0, 0, 5]), "height] in pixels"),
        (changed(box=[0, 0, "5", 5]), "height] in pixels"),
        (changed(box=None, center=[3, 4]), "height] in pixels"),
        (changed(box=[150, 0, 60, 50]), "expected one inside the picture of 200x100 pixels"),
        (changed(box=[-5, 0, 60, 50]), "expected one inside"),
        (changed(group="yes"), "with 'group': 'yes', expected true or false"),
        (changed(groups=True), "the attribute 'groups', expected .*; did you mean 'group'"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, content, message):
    path = written(tmp_path / "wrong.json", content)
    with pytest.raises(UserError, match=message) as raised:
        scenes.read(path, Rule(("cat", "dog"), 64))
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def kind(name="boxes", **options):
    return make(name, {"classes": CLASSES, "tokens": 64, "objects": 3} | options)


def test_too_many_objects_are_refused_where_a_person_gives_them(tmp_path):
    path = written(tmp_path / "many.json", GOOD | {"objects": GOOD["objects"] * 4})
    with pytest.raises(UserError, match=r"many.json: got 4 objects, expected at most 3"):
        kind().read(path)
    with pytest.raises(UserError, match="classes: got nothing, expected the class names, .* add classes="):
        make("boxes", {"tokens": 64})
    with pytest.raises(
        UserError, match="tokens: got nothing, expected the number of codes of the first stage, .* add tokens="
    ):
        make("centers", {"classes": CLASSES})
    with pytest.raises(UserError, match="got 2 names, 1 of them different"):
        kind(classes=["cat", "cat"]).check(8)
    assert kind(attributes="inside").rule.attributes == ("inside",)
    listed = written(tmp_path / "names.txt", "cat\n\n dog \n")
    assert kind(classes=str(listed)).rule.classes == ("cat", "dog")


# --- crops, windows, pictures ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Four photographs of 48x32 pixels whose scenes are a box around the left half and one around the lower right."""
    for number, pixels in enumerate(tiny.photographs(4, 48)):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels[:32]).save(tmp_path / f"images/{number}.png")
        objects = [{"class": "cat", "box": [0, 0, 48, 64]}, {"class": "dog", "box": [56, 32, 40, 32]}]
        written(tmp_path / f"conditions/{number}.json", {"width": 96, "height": 64, "objects": objects})
    return tmp_path


def dataset(folder, name="boxes", **options):
    settings = {"classes": CLASSES, "tokens": 1024, "objects": 3, "size": 16, "short_side": 32}
    return build({"name": "conditions", "path": str(folder), "kind": name} | settings | options)[0]


@pytest.mark.parametrize("crop_tokens", [True, False])
def test_crops_and_flips_are_those_of_the_image(folder, crop_tokens):
    data = dataset(folder, crop_tokens=crop_tokens)
    rule, whole = data.kind.rule, np.asarray(Image.open(data.paths[0]))
    marks = {0: (0, 0, 24, 32), 1: (28, 16, 20, 16)}  # of the pictures as they are read
    seen, flips, orders = set(), set(), set()
    for epoch in range(40):
        data.set_epoch(epoch)
        item = data[0]
        pixels = np.round((item["image"].numpy() + 1) * 127.5).astype(np.uint8)
        places = [(t, left, flip) for flip in (False, True) for t in range(17) for left in range(33)
                  if np.array_equal(whole[t : t + 16, left : left + 16][:, :: -1 if flip else 1], pixels)]  # fmt: skip
        assert len(places) == 1, "the crop is found in the photograph"
        (top, left, flipped), (things, crop) = places[0], rule.decode(item["objects_bbox"])
        # Columns and rows that each box covers in the crop, by counting pixels.
        for thing in things:
            x, y, w, h = marks[thing.label]
            columns = np.zeros(48, bool)
            columns[x : x + w] = True
            columns = columns[left : left + 16][:: -1 if flipped else 1]
            if crop_tokens:
                assert scenes.inside((0, 0, 1, 1), crop)[2] == pytest.approx(16 / 48, abs=0.05)
                box = scenes._relative(thing.box, crop)
            else:
                box = thing.box
            covered = np.zeros(16, bool)
            covered[max(0, round(box[0] * 16)) : max(0, round((box[0] + box[2]) * 16))] = True
            assert (covered != columns).sum() <= 2 + crop_tokens
        labels = [thing.label for thing in things]
        assert set(labels) == {n for n, (x, y, w, h) in marks.items() if x < left + 16 and left < x + w and y + h > top
                               and top + 16 > y}  # fmt: skip
        seen.add(tuple(sorted(labels)))
        flips.add(flipped)
        orders.add(tuple(labels))
    assert flips == {True, False} and seen >= {(0,), (1,)} and {(0, 1), (1, 0)} <= orders


def test_batches_are_tokens_and_do_not_depend_on_workers(folder):
    data = dataset(folder, "centers")
    first, again = (next(iter(loader(data, 2, seed=0, epoch=3, workers=n))) for n in (0, 1))
    assert first["objects_center_points"].shape == (2, 3 * 2 + 2)
    assert (first["objects_center_points"] == again["objects_center_points"]).all()


def test_a_file_of_another_shape_is_named(folder):
    for path in (folder / "conditions").iterdir():
        written(path, json.loads(path.read_text()) | {"width": 200})
    with pytest.raises(UserError, match=r"\d.json: got 200x64 pixels"):
        dataset(folder)[0]


def test_the_tokens_of_each_window_describe_its_own_crop():
    made = kind(tokens=1024, objects=3)
    scene = Scene((Thing(0, (0, 0, 0.4, 1)), Thing(1, (0.8, 0.5, 0.2, 0.5))), (32, 64))
    tokens = made.windows(scene, 4, 8, 4)
    assert tokens.shape == (4, 8, made.rule.length) and not tokens[1:].any() and not tokens[:, 5:].any()
    for column in range(5):
        assert tokens[0, column].tolist() == made.rule.encode(scene.things, (column / 8, 0, 0.5, 1)).tolist()
    labels = [[thing.label for thing in made.rule.decode(tokens[0, column])[0]] for column in range(5)]
    assert labels == [[0], [0], [0], [0, 1], [1]]
    # A canvas of another shape than the picture shows its middle.
    square = scene.fitted(32, 32)
    assert square.region == (0.25, 0, 0.5, 1)
    assert made.windows(square, 4, 4, 4)[0, 0].tolist() == made.rule.encode(scene.things, (0.25, 0, 0.5, 1)).tolist()


def test_a_crop_of_less_than_a_cell_can_be_shown():
    made = kind(tokens=16)
    tokens = made.rule.encode([THING_OF_ALL], (0.4, 0.4, 0.02, 0.02))
    assert made.rule.decode(tokens)[1][2:] == (0, 0)
    assert made.picture_of_tokens(tokens, (32, 32)).shape == (32, 32, 3)


@pytest.mark.parametrize("crop_tokens", [True, False])
@pytest.mark.parametrize("name", ["boxes", "centers"])
def test_pictures_show_the_objects_where_they_are(name, crop_tokens):
    made = kind(name, tokens=4096, objects=3, crop_tokens=crop_tokens)
    scene = Scene((Thing(0, (0.25, 0.25, 0.25, 0.5)),), (128, 256))
    color = label_colors(2)[0]

    def places(picture):
        rows, columns = np.nonzero(np.abs(picture - color).max(-1) < 0.02)
        return rows.min(), columns.min()

    drawn = made.picture(scene)
    assert drawn.shape == (128, 256, 3) and drawn.dtype == np.float32 and drawn.min() >= -1 and drawn.max() <= 1
    assert np.abs(np.subtract(places(drawn), (32, 64))).max() <= 1
    decoded = made.picture_of_tokens(made.windows(scene, 8, 16, 16), (128, 256))
    expected = (32, 64) if name == "boxes" else (62, 94)  # or the dot's border, around the centre
    assert np.abs(np.subtract(places(decoded), expected)).max() <= 3
    windows = made.windows(scene, 8, 16, 8)
    assert np.abs(np.subtract(places(made.picture_of_tokens(windows, (128, 256))), expected)).max() <= 4
