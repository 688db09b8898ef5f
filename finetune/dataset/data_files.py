"""Open a data file, decompressing it on the fly; its kind is recognised by its first bytes, not by its name."""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

CHUNK_BYTES = 1 << 20
GZIP, ZSTD, PARQUET, ARROW = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1", b"ARROW1"
ARROW_STREAM = b"\xff\xff\xff\xff"  # what save_to_disk writes
REFUSED_KINDS = {
    b"PK\x03\x04": "a zip archive: unpack it and name the files in it",
    **dict.fromkeys(
        (ARROW, ARROW_STREAM), "an Arrow file: name the folder that save_to_disk wrote, or write it as Parquet"
    ),
    b"\xfd7zXZ": "an xz file: unpack it, or pack it with gzip or zstd",
    b"BZh": "a bzip2 file: unpack it, or pack it with gzip or zstd",
    b"7z\xbc\xaf": "a 7z archive: unpack it and name the files in it",
    b"SQLite format 3": "a database: write its rows as JSON lines",
    b"version https://git-lfs": "a pointer of Git LFS, not the data: fetch the data with git lfs pull",
}
REFUSED_SUFFIXES = {
    ".zip": REFUSED_KINDS[b"PK\x03\x04"],
    ".xlsx": "a spreadsheet: write it as CSV, with the names of the columns in the first line",
    ".tar": "a tar archive: unpack it and name the files in it",
    ".tgz": "a tar archive: unpack it and name the files in it",
    ".docx": "a document: write its conversations as JSON lines",
    ".yaml": "a YAML file: a recipe stands without a flag, as in `finetune train FILE.yaml`; data is JSON or Parquet",
    ".safetensors": "the weights of a model: give the folder of the model as --model_name_or_path",
}
_TAR_MAGIC_OFFSET = 257


class UnreadableFileError(Exception):
    """A file, or the rest of it, cannot be read; the message is complete."""


class DataFile:
    """A file open for reading, decompressed on the fly; `head` is the first chunk, which `chunks` yields again.

    `name` is for messages.
    """

    def __init__(self, raw: BinaryIO, name: str) -> None:
        self._raw, self.name = raw, name
        magic = raw.read(16)
        raw.seek(0)
        self.packed = magic.startswith((GZIP, ZSTD))
        self.is_parquet = magic.startswith(PARQUET)
        self._stream = _decompressor(raw, magic)
        self.head = b"" if self.is_parquet else self._read()
        if not self.is_parquet:
            self._refuse_other_kinds()

    def position(self) -> int:
        """Compressed bytes read so far; 0 once the file is closed."""
        return 0 if self._raw.closed else self._raw.tell()

    def chunks(self) -> Iterator[bytes]:
        """The decompressed bytes from the beginning; `UnreadableFileError` if they are cut short or damaged."""
        chunk = self.head
        while chunk:
            yield chunk
            chunk = self._read()

    def _read(self) -> bytes:
        try:
            return self._stream.read(CHUNK_BYTES)
        except EOFError:
            raise self._stream_fault("gzip", "cut short") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise self._stream_fault("gzip", f"damaged ({error})") from None
        except OSError as error:
            if error.errno is not None:
                raise
            text = str(error).strip()
            raise self._stream_fault("zstd", "cut short" if "runcated" in text else f"damaged ({text})") from None

    def _stream_fault(self, kind: str, fault: str) -> UnreadableFileError:
        return UnreadableFileError(f"{self.name}: the {kind} stream is {fault}: fetch or pack the file again")

    def _refuse_other_kinds(self) -> None:
        reason = next((reason for magic, reason in REFUSED_KINDS.items() if self.head.startswith(magic)), None)
        if self.head[_TAR_MAGIC_OFFSET : _TAR_MAGIC_OFFSET + 5] == b"ustar":
            reason = REFUSED_SUFFIXES[".tar"]
        if self.packed and self.head.startswith((GZIP, ZSTD, PARQUET)):
            reason = "a packed file inside a packed file: unpack it once"
        if reason is not None:
            raise UnreadableFileError(f"{self.name}: {reason}")

    def conversion(self, encoding: str) -> str:
        """Name the encoding of a text that is not UTF-8, and the command that converts it."""
        convert = f"iconv -f {encoding} -t UTF-8 {self.name} > {self.name}.utf8"
        if self.packed:
            convert = f"unpack it, then iconv -f {encoding} -t UTF-8"
        known_as = "GBK or GB18030" if encoding == "GB18030" else encoding
        return f"the text is {known_as}, not UTF-8: convert it: {convert}"


def _decompressor(raw: BinaryIO, magic: bytes) -> Any:
    if magic.startswith(GZIP):
        return gzip.GzipFile(fileobj=raw)
    if magic.startswith(ZSTD):
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    return raw


@contextmanager
def open_data_file(path: str, name: str) -> Iterator[DataFile]:
    """Open a file, or raise `UnreadableFileError` with the reason."""
    try:
        with open(path, "rb") as raw:
            yield DataFile(raw, name)
    except OSError as error:
        raise UnreadableFileError(f"{name}: cannot be read: {error.strerror or error}") from None


def wide_encoding(head: bytes) -> str | None:
    """Detect UTF-16 or UTF-32 by the byte order mark or by where the zero bytes are."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    begin = head[:4]
    if len(begin) < 4:
        return None
    if begin[1] == begin[3] == 0 not in begin[::2]:
        return "UTF-16LE"
    if begin[0] == begin[2] == 0 not in begin[1::2]:
        return "UTF-16BE"
    return None


def is_gb18030(part: bytes) -> bool:
    """Whether the bytes are GB18030 of which most characters are those of Chinese text."""
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(part)
    except UnicodeDecodeError:
        return False
    non_ascii = [letter for letter in text if not letter.isascii()]
    chinese = sum("\u4e00" <= letter <= "\u9fff" or letter in "，。？！：；、“”（）《》" for letter in non_ascii)
    both_high = sum(len(code) == 2 and min(code) >= 0xA1 for code in (letter.encode("gb18030") for letter in non_ascii))
    return len(non_ascii) >= 2 and min(chinese, both_high) >= 0.6 * len(non_ascii)
