"""Reports: the alignment of tables, the pixels of the comparison, the plot of the losses."""

import pytest
from PIL import Image

from revq.eval.report import comparison, page_paths, pairs, save_comparison, save_loss_plot, save_pages, table


def test_table():
    text = table(["", "PSNR", "SSIM"], [["VAE alone", "26.79", "0.8"], ["rectified", "3.1", "0.75"]])
    assert text.split("\n") == [
        "            PSNR  SSIM",
        "----------------------",
        "VAE alone  26.79   0.8",
        "rectified    3.1  0.75",
    ]
    with pytest.raises(ValueError, match="expected 2 cells"):
        table(["a", "b"], [["1"]])
    assert pairs([("a", "1"), ("long", "2")]) == "a     1\nlong  2"


def test_comparison_holds_every_picture(tmp_path):
    colors = [["red", "lime"], ["blue", "black"], ["yellow", "cyan"]]
    columns = [(f"c{i}", [Image.new("RGB", (96, 48), color) for color in column]) for i, column in enumerate(colors)]
    save_comparison(tmp_path / "p.png", columns)
    with Image.open(tmp_path / "p.png") as sheet:
        assert sheet.format == "PNG"
        found = {color: count for count, color in sheet.convert("RGB").getcolors(1 << 20)}
    for color in colors[0] + colors[1] + colors[2]:
        rgb = Image.new("RGB", (1, 1), color).getpixel((0, 0))
        assert 96 * 48 <= found[rgb] <= 96 * 48 + 300, color  # the labels are black, too
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


def test_comparison_refuses_columns_that_differ(tmp_path):
    small, large = Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))
    for columns in ([("a", [small]), ("b", [])], [("a", [small]), ("b", [large])], [("a", [])], []):
        with pytest.raises(ValueError, match="expected equally many"):
            save_comparison(tmp_path / "p.png", columns)
    assert list(tmp_path.iterdir()) == []


def test_loss_plot(tmp_path):
    records = [{"kind": "step", "step": s, "quantizer_loss": 1 / s, "rectifier_loss": 0.9 / s} for s in range(1, 30)]
    save_loss_plot(tmp_path / "without.png", records)
    records += [
        {"kind": "epoch", "step": s, "validation_quantized": 0.5, "validation_rectified": 0.4} for s in (10, 20)
    ]
    records += [{"kind": "epoch", "step": 30, "validation_quantized": None, "validation_rectified": None}]
    save_loss_plot(tmp_path / "with.png", records)
    pictures = {}
    for name in ("without.png", "with.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 300
            pictures[name] = picture.convert("RGB").tobytes()
    assert pictures["with.png"] != pictures["without.png"]


def test_comparison_names_its_rows(tmp_path):
    """Each name stands under its row; long, unprintable and undecodable ones are shortened or replaced."""
    pictures = [Image.new("RGB", (96, 48), "lime")] * 4
    names = ["a.png", "folder/" * 60 + "end.jpg", "line\nbreak\0\x1b.png", "\udcff.png"]
    sheet = comparison([("one", pictures), ("two", pictures)], names)
    assert sheet.size == (2 * 100 + 4, 22 + 4 * (48 + 4 + 16))
    blank = comparison([("one", pictures), ("two", pictures)], [""] * 4)
    for row in range(4):
        strip = (0, 22 + row * 68 + 48, sheet.width, 22 + row * 68 + 68)
        assert sheet.crop(strip).tobytes() != blank.crop(strip).tobytes(), row
        assert set(blank.crop(strip).tobytes()) == {255}
    end = comparison([("one", pictures), ("two", pictures)], ["a.png", "folder/" * 70 + "end.jpg", *names[2:]])
    assert end.tobytes() == sheet.tobytes()  # the end of a long name is shown
    with pytest.raises(ValueError, match="expected equally many"):
        comparison([("one", pictures)], ["a"])


def test_pages_appear_together(tmp_path):
    paths = page_paths(tmp_path / "p.png", 40)
    assert [path.name for path in paths] == ["p.png", "p-2.png", "p-3.png"] and len(page_paths("a.png", 16)) == 1
    paths[0].write_bytes(b"old")

    def sheets(stop):
        for number in range(2):
            if number == stop:
                raise KeyError
            yield Image.new("RGB", (8, 8 + number))

    with pytest.raises(KeyError):
        save_pages(paths, sheets(1))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"p.png": b"old"}
    assert save_pages(paths, sheets(2)) == paths[:2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p-2.png", "p.png"]
    with Image.open(paths[1]) as page:
        assert page.size == (8, 9)
