"""Identifies files that are not images by their first bytes, each with a remedy.

Image folders contain photos in formats that PIL does not read, files that a server or a version
control system stored instead of an image, and sidecar files of other programs. Only files that PIL
cannot read are examined here.
"""

import json
import os
import re
from typing import NamedTuple


class FileType(NamedTuple):
    """A type of file.

    Attributes:
      name: of the type, singular: "HEIC photo".
      remedy: imperative clause without a period.
    """

    name: str
    remedy: str


_DOWNLOAD_AGAIN = "download or copy it again"
_SAVE_UNSIGNED = "save it with 8 or 16 unsigned bits per channel"
# Types that PIL opens but decodes wrongly; of a raw file, for example, only the TIFF thumbnail.
CAMERA_RAW = FileType(
    "camera raw file", "convert it to JPEG or TIFF with darktable-cli or dcraw -T"
)
PROGRAM = FileType(
    "PostScript file (EPS is a program, and programs are not run)",
    "render it to PNG with ImageMagick or Ghostscript",
)
FLOATS = FileType("floating-point image, whose value range is unknown", _SAVE_UNSIGNED)
INTEGERS = FileType(
    "image of 32-bit or signed integers, whose value range is unknown", _SAVE_UNSIGNED
)
PLANES = FileType(
    "TIFF with planar 16-bit channels, which PIL misreads",
    "save it with interleaved channels",
)
WHITE_IS_ZERO = FileType(
    "TIFF with more than 8 bits whose 0 is white, which PIL reads inverted",
    "save it with black as 0",
)
_HEIC = FileType("HEIC photo", "convert it to JPEG with ImageMagick, heif-convert or sips")
_AVIF = FileType("AVIF image that Pillow cannot read", "convert it to PNG with avifdec")
_JPEG_XL = FileType("JPEG XL image", "convert it to PNG with djxl")
_JPEG_XR = FileType("JPEG XR image", "convert it to PNG with JxrDecApp")
_PHOTOSHOP = FileType("Photoshop file", "export it as PNG")
_GIMP = FileType("GIMP file", "export it as PNG")
_VIDEO = FileType("video", "extract its frames with ffmpeg -i FILE frame%05d.png")
_SOUND = FileType("audio file", "remove it")
_PDF = FileType("PDF document", "render it to PNG with pdftoppm -png")
_SVG = FileType("SVG drawing", "render it to PNG with rsvg-convert or Inkscape")
_METAFILE = FileType("Windows metafile", "render it to PNG with Inkscape")
_DICOM = FileType("DICOM file", "convert it to 16-bit PNG with dcm2pnm or pydicom")
_GZIP = FileType("gzip file", "unpack it with gunzip; save the slices of a NIfTI file as PNG")
_ARRAY = FileType("array file", "save each image as PNG with PIL.Image.fromarray")
_ARCHIVE = FileType("archive", "unpack it, then remove it")
_OFFICE = FileType("office document or Windows thumbnail cache", "remove it")
_LFS = FileType(
    "Git LFS pointer instead of an image", "run git lfs pull in the original repository"
)
_ANNEX = FileType(
    "git-annex pointer instead of an image", "run git annex get in the original repository"
)
_ENCRYPTED = FileType(
    "file encrypted by git-crypt", "run git-crypt unlock in the original repository"
)
_PAGE = FileType("web page instead of an image", "download the image itself")
_ANSWER = FileType("server response instead of an image (XML or JSON)", _DOWNLOAD_AGAIN)
_TEXT = FileType("text", "remove it")
_EMPTY = FileType("empty file", _DOWNLOAD_AGAIN)
_ZEROS = FileType("file of zeros, as left by a failed copy", _DOWNLOAD_AGAIN)

# First bytes by type.
_SIGNATURES: dict[FileType, tuple[bytes, ...]] = {
    _PDF: (b"%PDF",),
    _PHOTOSHOP: (b"8BPS",),
    _GIMP: (b"gimp xcf",),
    _JPEG_XL: (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
    _JPEG_XR: (b"II\xbc",),
    CAMERA_RAW: (
        *(b"II*\0\x10\0\0\0CR", b"FUJIFILMCCD-RAW"),
        *(b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FOVb", b"\0MRM"),
    ),
    _VIDEO: (
        *(b"\x1aE\xdf\xa3", b"FLV\x01", b"\0\0\1\xba", b"\0\0\1\xb3"),
        b"0&\xb2u\x8ef\xcf\x11",
    ),
    _SOUND: (b"ID3", b"fLaC", b"OggS"),
    _METAFILE: (b"\xd7\xcd\xc6\x9a",),
    _ARRAY: (b"\x93NUMPY", b"\x89HDF\r\n\x1a\n", b"MATLAB 5.0", b"\x80\x02", b"\x80\x04\x95"),
    _GZIP: (b"\x1f\x8b",),
    _ARCHIVE: (b"PK\3\4", b"7z\xbc\xaf\x27\x1c", b"Rar!", b"\xfd7zXZ\0", b"BZh"),
    _OFFICE: (b"\xd0\xcf\x11\xe0",),
    _LFS: (b"version https://git-lfs.github.com/spec/",),
    _ENCRYPTED: (b"\0GITCRYPT\0",),
}
# Signatures at other offsets: offset, bytes, type.
_OFFSET_SIGNATURES: tuple[tuple[int, bytes, FileType], ...] = (
    (128, b"DICM", _DICOM),
    (257, b"ustar", _ARCHIVE),
    (344, b"n+1\0", _ARRAY),
    (40, b" EMF", _METAFILE),
    (4, b"moov", _VIDEO),
    (4, b"mdat", _VIDEO),
    (4, b"wide", _VIDEO),
    (8, b"AVI ", _VIDEO),
    (8, b"WAVE", _SOUND),
)
# Major brands of ISO media files (first box 'ftyp'); all others are videos.
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), _AVIF),
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"mif2", b"msf1"), _HEIC
    ),
    b"crx ": CAMERA_RAW,
    b"M4A ": _SOUND,
}
# First bytes of formats that PIL reads, for files too damaged for PIL to identify.
_IMAGES: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"RIFF", "WebP"),
)
_RAW_ENDINGS = """
.dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .orf .rw2 .raf .pef .srw .x3f .3fr .iiq .erf .mrw .kdc
.dcr .raw .rwl
"""
_VIDEO_ENDINGS = ".mp4 .m4v .mov .avi .mkv .webm .wmv .flv .mpg .mpeg .mts .m2ts .3gp"
_ARRAY_ENDINGS = ".npy .npz .mat .h5 .hdf5 .nii .pkl .pt"
# Types by extension, if the content is not conclusive.
_ENDINGS = {
    **dict.fromkeys(_RAW_ENDINGS.split(), CAMERA_RAW),
    **dict.fromkeys((".heic", ".heif", ".hif"), _HEIC),
    **dict.fromkeys(_VIDEO_ENDINGS.split(), _VIDEO),
    **dict.fromkeys((".dcm", ".dicom"), _DICOM),
    **dict.fromkeys(_ARRAY_ENDINGS.split(), _ARRAY),
}
# Extensions and names of sidecar files: notes, logs, lists, annotations, scripts, trained networks,
# settings of raw developers, links, checksums. Saved web pages and arrays are excluded: if they
# were stored instead of images, a class would be lost.
_KEPT_BESIDE = """
.txt .text .md .rst .tex .rtf .bib .doc .docx .odt .xls .xlsx .ods .ppt .pptx .odp
.csv .tsv .json .jsonl .ndjson .geojson .xml .yaml .yml .toml .ini .cfg .conf .names .lst .list .idx
.log .out .err .lock .pid .db .sqlite .wandb .py .pyc .ipynb .sh .bat .ps1 .js .css .map
.safetensors .msgpack .onnx .stablehlo .pt .pth .tflite .ckpt .keras
.xmp .pp3 .dop .cos .aae .thm .url .webloc .lnk .desktop
.md5 .sha1 .sha256 .sha512 .sfv .crc .par2 .dvc .torrent .bak .license .readme
"""
_CALLED = """
readme license licence copying notice authors contributors credits attribution citation changelog
version makefile manifest md5sums sha1sums sha256sums checksums thumbs notes todo log
pax_global_header
"""
_SIDECAR_ENDINGS, _SIDECAR_NAMES = frozenset(_KEPT_BESIDE.split()), frozenset(_CALLED.split())
# Number of bytes examined to detect text.
_HEAD = 4096


def is_sidecar(file: str) -> bool:
    """Returns whether a path is named like a sidecar file, such as an annotation or a note."""
    name = os.path.basename(file).lower()
    stem, ending = os.path.splitext(name)
    # This program's reports, and TensorBoard logs.
    if name == "report.html" or ".tfevents." in name:
        return True
    return ending in _SIDECAR_ENDINGS or (not ending and stem in _SIDECAR_NAMES)


def is_raw_name(file: str) -> bool:
    """Returns whether a path has the extension of a camera raw file."""
    return _ENDINGS.get(os.path.splitext(file)[1].lower()) is CAMERA_RAW


def identify(data: bytes, file: str = "") -> FileType | None:
    """Identifies a file that is not an image, or is in a format that PIL does not read.

    Args:
      data: the file's content.
      file: its path; the extension decides if the content is not conclusive.

    Returns:
      The type; None if unknown, or if it begins like an image that PIL reads.
    """
    if not data:
        return _EMPTY
    for kind, starts in _SIGNATURES.items():
        if data.startswith(starts):
            return kind
    if data[4:8] == b"ftyp":
        return _iso_media(data)
    for place, content, kind in _OFFSET_SIGNATURES:
        if data.startswith(content, place):
            return kind
    by_name = _ENDINGS.get(os.path.splitext(file)[1].lower())
    if damaged_format(data):
        return by_name
    if not data.strip(b"\0"):
        return by_name or _ZEROS
    return _text(data) or by_name


def damaged_format(data: bytes) -> str:
    """Returns the format, of those that PIL reads, indicated by the first bytes, or ''."""
    return next((name for start, name in _IMAGES if data.startswith(start)), "")


def _iso_media(data: bytes) -> FileType:
    # The size of the box, which ends with the list of compatible brands.
    size = int.from_bytes(data[:4])
    brands = [data[place : place + 4] for place in (8, *range(16, min(size, 256), 4))]
    kinds = [_BRANDS[brand] for brand in brands if brand in _BRANDS]
    # 'mif1' is used for any still image: a later brand identifies the format.
    return _AVIF if _AVIF in kinds else kinds[0] if kinds else _VIDEO


def _text(data: bytes) -> FileType | None:
    """Returns the type of a text file, or None if it is not text."""
    head = data[:_HEAD]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = head.decode("utf-16", "replace")
    elif any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in head):
        return None
    else:
        text = head.decode("utf-8", "replace")
    text = text.removeprefix("\ufeff").lstrip().lower()
    if re.match(r"/annex/objects/|(\.\./)*\.git/annex/", text):
        return _ANNEX
    if re.match(r"(<\?xml[^>]*>\s*|<!--.*?-->\s*|<!doctype svg[^>]*>\s*)*<svg", text, re.DOTALL):
        return _SVG
    if re.search(r"<!doctype html|<html|<head|<body", text):
        return _PAGE
    if text.startswith("<") or _is_json(text, complete=len(data) <= _HEAD):
        return _ANSWER
    return _TEXT


def _is_json(text: str, *, complete: bool) -> bool:
    if not text.startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except ValueError:
        return not complete
    return True
