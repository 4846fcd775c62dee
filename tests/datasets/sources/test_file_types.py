import gzip
import json

import pytest

from inception_jax.datasets import decode
from inception_jax.datasets.sources import file_types


@pytest.mark.parametrize(
    ("data", "file", "name", "remedy"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300), "a.jpg", "HEIC", "JPEG"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(300), "a.jpg", "HEIC", "JPEG"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif" + bytes(300), "a.jpg", "AVIF", "PNG"),
        (b"\0\0\0\x18ftypmp42" + bytes(300), "a.jpg", "video", "ffmpeg"),
        (b"\0\0\0\x14ftypqt  " + bytes(300), "a.mov", "video", "ffmpeg"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(300), "a.jpg", "raw", "JPEG or TIFF"),
        (b"\x1aE\xdf\xa3" + bytes(300), "a.jpg", "video", "ffmpeg"),
        (b"RIFF\0\1\0\0AVI LIST" + bytes(300), "a.jpg", "video", "ffmpeg"),
        (b"II*\0" + bytes(2000), "IMG.DNG", "raw", "JPEG or TIFF"),
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(2000), "a.jpg", "raw", "JPEG or TIFF"),
        (b"FUJIFILMCCD-RAW 0201" + bytes(300), "a.raf", "raw", "JPEG or TIFF"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(300), "a.jpg", "JPEG XL", "djxl"),
        (b"\xff\x0a" + bytes(300), "a.jxl", "JPEG XL", "djxl"),
        (b"%PDF-1.7\n", "a.jpg", "PDF", "pdftoppm"),
        (b"<?xml version='1.0'?>\n<svg xmlns='x'></svg>", "a.svg", "SVG", "rsvg-convert"),
        (b"<!-- Made by hand -->\n<svg></svg>", "a.jpg", "SVG", "rsvg-convert"),
        (b"8BPS\0\1" + bytes(10), "a.psd", "Photoshop", "export"),
        (bytes(128) + b"DICM" + bytes(300), "a.jpg", "DICOM", "dcm2pnm"),
        (b"\x93NUMPY\1\0", "a.npy", "array", "PNG"),
        (b"\x89HDF\r\n\x1a\n" + bytes(300), "a.h5", "array", "PNG"),
        (gzip.compress(b"x", mtime=0), "a.nii.gz", "gzip", "unpack"),
        (b"PK\3\4" + bytes(300), "a.jpg", "archive", "unpack"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a.jpg", "LFS", "lfs pull"),
        (b"/annex/objects/SHA256E-s1--0.jpg\n", "a.jpg", "git-annex", "git annex get"),
        (b"<!DOCTYPE html><html>404</html>", "a.jpg", "web page", "download"),
        (b"\n\xef\xbb\xbf<HTML><body>no", "a.jpg", "web page", "download"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "a.jpg", "response", "download"),
        (json.dumps({"error": "x" * 9000}).encode(), "a.jpg", "response", "download"),
        (b"a note in caf\xc3\xa9", "a.jpg", "text", "remove"),
        (b"", "a.jpg", "empty file", "download"),
        (bytes(5000), "a.jpg", "file of zeros", "copy it again"),
    ],
)
def test_non_images_are_identified_with_remedy(
    data: bytes, file: str, name: str, remedy: str
) -> None:
    problem = decode.inspect(data, file).problem
    assert problem is not None
    assert name in problem.kind and remedy in problem.remedy and not problem.detail
    with pytest.raises(decode.ImageError, match="not a readable image") as error:
        decode.decode(data, 16, file)
    assert name in str(error.value) and problem.advice in str(error.value)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("start", [b"\xff\xd8\xff\xe0", b"\x89PNG", b"GIF89a", b"MM\0*"])
def test_file_with_image_signature_is_damaged_image(start: bytes) -> None:
    problem = decode.inspect(start + b" and no more", "a.jpg").problem
    assert problem is not None and problem.kind == "damaged image" and problem.detail


def test_sidecars_are_recognized_by_name() -> None:
    sidecars = ["a/x.txt", "a/x.XML", "README", "a/LICENSE", "x.jpg.json", "x.AAE", "a.b/x.url"]
    assert all(file_types.is_sidecar(file) for file in sidecars)
    others = ["a/x.jpg", "x", "x.npy", "x.heic", "x.mp4", "readme.jpg", "x.txt/y", "x.pdf"]
    assert not any(file_types.is_sidecar(file) for file in others)
