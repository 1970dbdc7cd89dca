"""Pictures in, upright faces out: opening, finding, aligning."""

import logging
import os
import struct
import threading
import zlib
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from io import BytesIO
from pathlib import Path

import insightface
import matplotlib
import numpy as np
import pytest
import skimage.data
from PIL import Image
from transformers.dynamic_module_utils import get_imports

from au_llava import face_alignment
from au_llava.face_alignment import CROP_SIZE, FIVE_POINTS, align, find_faces, open_image


ASSETS = Path(os.environ.get("AU_LLAVA_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets"))
MODELS = [Path(os.environ["AU_LLAVA_SCRFD"])] if "AU_LLAVA_SCRFD" in os.environ else sorted(ASSETS.glob("det_*.onnx"))
PARTY = Path(insightface.__file__).parent / "data" / "images" / "t1.jpg"
# where SCRFD sees the eyes, nose and mouth of scikit-image's astronaut
ASTRONAUT = [(204.3, 100.2), (246.7, 102.6), (223.8, 127.5), (202.7, 139.8), (244.5, 141.7)]


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    return Image.fromarray(skimage.data.astronaut())


@pytest.fixture
def no_model(monkeypatch, tmp_path):
    """A machine on which no SCRFD model lies, and from which none can be fetched."""
    monkeypatch.delenv("AU_LLAVA_SCRFD", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    logging.Logger.warning_once.cache_clear()


def halves(mode: str = "RGB") -> Image.Image:
    """40 x 20 pixels, red left and white right, or black and white."""
    image = Image.new("RGB", (40, 20), "red")
    image.paste("white", (20, 0, 40, 20))
    return image.convert(mode)


def encode(image: Image.Image, kind: str, **kwargs) -> bytes:
    data = BytesIO()
    image.save(data, kind, **kwargs)
    return data.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# --- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "kind", "left"),
    [
        ("RGB", "PNG", (255, 0, 0)), ("RGB", "JPEG", (254, 0, 0)), ("RGBA", "PNG", (255, 0, 0)),
        ("P", "PNG", (255, 0, 0)), ("CMYK", "TIFF", (255, 0, 0)), ("CMYK", "JPEG", (254, 0, 0)),
        ("L", "PNG", (76, 76, 76)), ("LA", "PNG", (76, 76, 76)), ("1", "PNG", None), ("P", "GIF", (255, 0, 0)),
        ("RGB", "WEBP", (254, 0, 0)), ("RGB", "BMP", (255, 0, 0)), ("YCbCr", "JPEG", (254, 0, 0)),
    ],
)  # fmt: skip
def test_every_mode_becomes_rgb(mode, kind, left):
    image = open_image(encode(halves(mode), kind))
    assert (image.mode, image.size) == ("RGB", (40, 20))
    assert np.abs(np.subtract(image.getpixel((35, 10)), 255)).max() <= 3
    if left:
        assert np.abs(np.subtract(image.getpixel((5, 10)), left)).max() <= 6


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32)])
def test_sixteen_bits_are_scaled_not_clipped(kind, dtype):
    ramp = np.tile(np.linspace(0, 65535, 256).astype(dtype), (4, 1))
    image = np.asarray(open_image(encode(Image.fromarray(ramp), kind)))
    assert np.array_equal(image[0, :, 0], np.arange(256))


def test_what_is_transparent_becomes_white():
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    for data in (encode(clear, "PNG"), encode(palette, "PNG", transparency=1), encode(palette, "GIF", transparency=1)):
        assert open_image(data).getpixel((1, 1)) == (255, 255, 255)
    assert open_image(Image.new("LA", (4, 4), (0, 128))).getpixel((1, 1)) == (127, 127, 127)


@pytest.mark.parametrize(
    ("array", "pixel"),
    [
        (np.full((4, 6), 200, np.uint8), 200), (np.full((4, 6, 1), 200, np.uint8), 200),
        (np.full((4, 6, 3), 200, np.uint8), 200), (np.full((4, 6, 4), 255, np.uint8), 255),
        (np.full((4, 6), 200, np.int64), 200), (np.full((4, 6), 200, np.int16), 200),
        (np.full((4, 6, 3), 200 * 257, np.uint16), 200), (np.full((4, 6), 200, np.uint16), 1),
        (np.full((4, 6), 0.5, np.float32), 128), (np.full((4, 6, 3), 1.02), 255), (np.full((4, 6), 200.0), 200),
        (np.ones((4, 6), bool), 255),
    ],
)  # fmt: skip
def test_arrays_of_every_kind(array, pixel):
    image = open_image(array)
    assert (image.mode, image.size, image.getpixel((3, 2))) == ("RGB", (6, 4), (pixel,) * 3)


def test_exif_orientation_is_applied_once_and_a_broken_block_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: what is stored as left is shown on top
    image = open_image(encode(halves(), "PNG", exif=exif))
    assert (image.size, image.getpixel((10, 5)), image.getpixel((10, 35))) == ((20, 40), (255, 0, 0), (255, 255, 255))
    assert open_image(image).size == (20, 40)
    assert open_image(encode(halves(), "PNG", exif=b"Exif\0\0rubbish")).size == (40, 20)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((4, 4)) == (255, 0, 0)


def test_paths_and_urls(tmp_path):
    (tmp_path / "face.png").write_bytes(encode(halves(), "PNG"))
    server = HTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        for source in (tmp_path / "face.png", str(tmp_path / "face.png"), f"{address}/face.png"):
            assert open_image(source).getpixel((5, 5)) == (255, 0, 0)
        with pytest.raises(ValueError, match=rf"{address}/none.png: cannot be fetched .*404"):
            open_image(f"{address}/none.png")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no picture in it"),
        (b"plain text, not a picture", "no picture in it"),
        (encode(Image.effect_noise((64, 64), 50), "JPEG")[:-600], "damaged .*truncated"),
        (encode(Image.effect_noise((64, 64), 50), "PNG")[:-900], "damaged"),
        (png_header(20_000, 20_000), "too large .*400000000 pixels"),
        (png_header(12_000, 9_000), "too large .*12000 x 9000 pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_are_named_with_what_is_wrong(tmp_path, data, message):
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"bad.jpg: .*{message}"):
        open_image(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((3, 20, 20)), "channels last"), (np.zeros((0, 5)), "height, width"), (np.zeros(5), "height, width"),
        (np.full((2, 2), np.nan), "floats from 0 to 1"), (np.full((2, 2), -1), "integers from 0 to 255"),
        (np.array([[-2.1, 2.6]]), "floats from 0 to 1"), (np.full((2, 2), 70000), "65535"), (None, "NoneType"),
        ({"image": b""}, "dict: .*give a path, URL, bytes, open file, PIL image or array"),
        ("nowhere/face.png", "nowhere/face.png: no such file"), (Path("tests"), "tests: no such file"),
        ("data:image/png;base64," + "A" * 5000, r"^data:image/png;base64,A+\.\.\. \(50\d\d characters\): .* bytes"),
    ],
)  # fmt: skip
def test_bad_sources(source, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_image(source)


# --- aligning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [CROP_SIZE, 112])
@pytest.mark.parametrize("scale", [0.4, 1.0, 2.5])
def test_five_points_come_to_lie_on_the_template(scale, size):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255), (0, 255, 255)]
    turn = scale * np.exp(0.35j)  # 20 degrees
    places = [turn * complex(x, y) + 350 * scale - 20 * scale * 1j for x, y in FIVE_POINTS]
    rows, columns = np.indices((round(420 * scale), round(520 * scale)))
    dots = [np.exp(-(((abs(columns + 1j * rows - z)) / (4 * scale)) ** 2)) for z in places]  # round off to no pixel
    image = Image.fromarray(np.tensordot(dots, colours, axes=(0, 0)).astype(np.uint8))
    crop = np.asarray(align(image, [(z.real, z.imag) for z in places], size), dtype=float)
    assert crop.shape == (size, size, 3)
    for (x, y), colour in zip(FIVE_POINTS, colours, strict=True):
        on = np.array(colour) > 0
        like = (crop[:, :, on].min(2) - crop[:, :, ~on].max(2)).clip(0)
        rows, columns = np.indices(like.shape)
        found = np.array([(like * columns).sum(), (like * rows).sum()]) / like.sum()
        expected = (np.array([x, y]) + 0.5) * size / CROP_SIZE - 0.5
        assert np.abs(found - expected).max() < 0.3


def test_a_large_face_is_smoothed_before_it_is_made_small():
    board = Image.fromarray((np.indices((1200, 1200)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    crop = np.asarray(align(board, [(5 * x + 30, 5 * y + 30) for x, y in FIVE_POINTS]))
    assert crop.std() < 3  # plain sampling gives above 100


def test_beyond_the_photograph_it_is_black():
    crop = align(Image.new("RGB", (100, 100), "white"), [(x - 112, y) for x, y in FIVE_POINTS])
    assert crop.getpixel((50, 50)) == (0, 0, 0)
    assert crop.getpixel((180, 50)) == (255, 255, 255)


@pytest.mark.parametrize("points", [[(1, 2)] * 5, [(1, 2), (3, 4)], [(float("nan"), 1)] * 5])
def test_points_that_make_no_face(points):
    with pytest.raises(ValueError, match="make no face"):
        align(Image.new("RGB", (20, 20)), points)


# --- finding ---------------------------------------------------------------------------------------------------------


def test_none_takes_the_picture_for_the_face(astronaut):
    (face,) = find_faces(astronaut.crop((100, 0, 324, 224)), "none")
    assert (face.box, face.score, face.points) == (None, None, None)
    assert np.array_equal(np.asarray(face.crop), np.asarray(astronaut.crop((100, 0, 324, 224))))
    (tall,) = find_faces(Image.new("RGB", (100, 200), "white"), "none")
    assert (tall.crop.size, tall.crop.getpixel((112, 5)), tall.crop.getpixel((20, 112))) == (
        (CROP_SIZE, CROP_SIZE), (255, 255, 255), (0, 0, 0),
    )  # fmt: skip


def difference(first: Image.Image, second: Image.Image) -> float:
    return float(np.abs(np.subtract(first.convert("L"), second.convert("L"), dtype=float)).mean())


@pytest.mark.parametrize("scale", [0.5, 1, 3])
def test_the_cascade_finds_the_astronaut_and_cuts_as_the_five_points_would(astronaut, scale):
    photo = astronaut.resize((round(512 * scale), round(512 * scale)))
    face, *others = find_faces(photo, "cascade")
    assert len(others) <= 1  # a patch of the shuttle comes close
    assert (face.score, face.points, face.crop.size) == (None, None, (CROP_SIZE, CROP_SIZE))
    x0, y0, x1, y1 = np.array(face.box) / scale
    assert x0 < 204 < 247 < x1 and y0 < 100 < 142 < y1
    # 36 grey levels lie between a crop and the same moved by 11 pixels, 42 with the face larger by a fifth
    assert difference(face.crop, align(astronaut, ASTRONAUT)) < 30


def test_no_face_gives_an_empty_list():
    for photo in (skimage.data.coffee(), skimage.data.brick(), np.zeros((1, 1)), np.zeros((3, 2000))):
        assert find_faces(open_image(photo), "cascade") == []


def test_auto_without_a_model_takes_the_cascade_and_says_so_once(astronaut, no_model, caplog):
    with caplog.at_level(logging.WARNING):
        assert [face.score for face in find_faces(astronaut) + find_faces(astronaut)] == [None, None]
    (record,) = [r for r in caplog.records if "cascade" in r.message]
    assert all(way in record.message for way in ("AU_LLAVA_SCRFD", "detector='scrfd'", "--detector scrfd"))


def test_scrfd_offline_without_a_model_is_one_clear_error(astronaut, no_model):
    with pytest.raises(RuntimeError, match="AU_LLAVA_SCRFD"):
        find_faces(astronaut, "scrfd")


def test_unknown_detectors_and_counts(astronaut, tmp_path):
    with pytest.raises(ValueError, match="'mtcnn'.*auto, scrfd, cascade, none"):
        find_faces(astronaut, "mtcnn")
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"max_faces is {count}"):
            find_faces(astronaut, "cascade", max_faces=count)
    with pytest.raises(FileNotFoundError, match="absent.onnx"):
        find_faces(astronaut, str(tmp_path / "absent.onnx"))
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ValueError, match="text.onnx: not an SCRFD model"):
        find_faces(astronaut, str(tmp_path / "text.onnx"))


def constant_scrfd(path: Path) -> Path:
    """A network shaped like SCRFD's at 640 x 640 that always sees one face, 128 pixels wide, around (320, 320)."""
    from onnx import TensorProto, helper, numpy_helper, save_model

    outputs, constants = [], []
    for part, width in (("score", 1), ("box", 4), ("points", 10)):
        for stride in (8, 16, 32):
            value = np.zeros((2 * (640 // stride) ** 2, width), np.float32)
            if stride == 32:  # the first of the two anchors in row 10 and column 10
                places = (np.array(FIVE_POINTS) - 112) / 64
                value[2 * (10 * 20 + 10)] = {"score": 0.9, "box": 2, "points": places.ravel()}[part]
            outputs.append(helper.make_tensor_value_info(f"{part}{stride}", TensorProto.FLOAT, value.shape))
            constants.append(
                helper.make_node("Constant", [], [f"{part}{stride}"], value=numpy_helper.from_array(value))
            )
    picture = helper.make_tensor_value_info("picture", TensorProto.FLOAT, (1, 3, 640, 640))
    graph = helper.make_graph(constants, "scrfd", [picture], outputs)
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
    return path


def test_the_way_to_scrfd_and_back_to_the_photograph(tmp_path, no_model, monkeypatch):
    photo = Image.effect_noise((640, 480), 60).convert("RGB")
    model = constant_scrfd(tmp_path / "own.onnx")
    near, far = find_faces(photo, str(model))  # the same answer to both copies is a near face and a far one
    # the small copy is half as large as the photograph, behind a border of 160 pixels
    assert near.box == pytest.approx((192, 192, 448, 448), abs=0.01)
    expected = (320 - 160) / 0.5 + (np.array(FIVE_POINTS) - 112) / 64 * 32 / 0.5
    assert np.array(near.points) == pytest.approx(expected, abs=0.01)
    assert near.score == pytest.approx(0.9) and near.box[0] < far.box[0] < far.box[2] < near.box[2]
    assert difference(near.crop, align(photo, near.points)) == 0
    assert [face.box for face in find_faces(photo, str(model), max_faces=1)] == [near.box]

    monkeypatch.setenv("AU_LLAVA_SCRFD", str(model))
    assert [face.box for face in find_faces(photo)] == [near.box, far.box]
    monkeypatch.delenv("AU_LLAVA_SCRFD")
    downloaded = tmp_path / ".insightface" / "models" / "buffalo_sc" / "det_500m.onnx"
    downloaded.parent.mkdir(parents=True)
    model.rename(downloaded)
    for detector in ("auto", "scrfd"):
        assert [face.box for face in find_faces(photo, detector)] == [near.box, far.box]


@pytest.fixture(params=MODELS or [None], ids=lambda path: path.stem if path else "none")
def scrfd(request) -> str:
    if request.param is None:
        pytest.skip("no SCRFD model at hand: set AU_LLAVA_SCRFD to the path of one")
    return str(request.param)


def test_scrfd_finds_everyone_at_the_table(scrfd):
    if not PARTY.is_file():
        pytest.skip("insightface comes without its sample photograph")
    faces = find_faces(open_image(PARTY), scrfd)
    assert len(faces) == 6
    areas = [(f.box[2] - f.box[0]) * (f.box[3] - f.box[1]) for f in faces]
    assert areas == sorted(areas, reverse=True)
    assert all(0.5 < f.score <= 1 and f.crop.size == (CROP_SIZE, CROP_SIZE) for f in faces)


def test_the_cascade_puts_a_face_where_the_template_has_it(scrfd):
    photo = open_image(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    for detector, most in ((scrfd, 5), ("cascade", 8)):
        (face,) = find_faces(photo, detector)
        (again,) = find_faces(face.crop, scrfd)
        assert np.linalg.norm(np.subtract(again.points, FIVE_POINTS), axis=1).mean() < most


@pytest.mark.parametrize("width", [112, 480, 1600])
def test_scrfd_finds_a_face_that_fills_the_frame(scrfd, astronaut, width):
    tight = astronaut.crop((178, 60, 270, 175))
    (face,) = find_faces(tight.resize((width, round(width * 1.25))), scrfd)
    assert face.box[2] - face.box[0] > 0.9 * width


def test_scrfd_finds_a_face_of_forty_pixels_in_a_large_photograph(scrfd, astronaut):
    photo = Image.effect_noise((3000, 2000), 40).convert("RGB")
    part = astronaut.crop((120, 0, 340, 280))  # its face is 91 pixels wide
    photo.paste(part.resize((97, 123), Image.Resampling.LANCZOS), (2100, 700))
    (face,) = find_faces(photo, scrfd)
    assert 32 < face.box[2] - face.box[0] < 48
    assert 2100 < face.box[0] < face.box[2] < 2197


@pytest.mark.parametrize("degrees", [-30, 0, 30])
def test_scrfd_turns_faces_upright(scrfd, astronaut, degrees):
    (face,) = find_faces(astronaut.rotate(degrees, Image.Resampling.BICUBIC, center=(227, 125)), scrfd)
    centre = np.s_[40:180, 50:175]  # the corners differ: the photograph was turned
    crops = [np.asarray(crop.convert("L"), dtype=float)[centre] for crop in (face.crop, align(astronaut, ASTRONAUT))]
    assert np.abs(crops[0] - crops[1]).mean() < 26  # 10 degrees make 27


def test_the_hub_may_load_the_file_without_the_detectors():
    assert set(get_imports(face_alignment.__file__)) & {"insightface", "onnxruntime", "skimage", "cv2"} == set()
