"""Bytes of a user's file -> text: gzip unpacked, binaries named by their first bytes, UTF-8 or UTF-16.

Owns what bytes are. Does not know what the text says. Each fault is one line: what the file is, and the remedy.
"""

from __future__ import annotations

import re
import unicodedata
import zlib

from cai.errors import CaiError
from cai.store.reading import MOST_BYTES

PARQUET = "In Python: pandas.read_parquet(FILE).to_json(NEW, orient='records', lines=True)."
UNPACK = "Unpack it and give the file inside."
SIGNATURES = (  # first bytes, what they are, what to do
    (b"PAR1", "a Parquet file", PARQUET),
    (b"ARROW1", "an Arrow file", PARQUET.replace("read_parquet", "read_feather")),
    (b"FEA1", "a Feather file", PARQUET.replace("read_parquet", "read_feather")),
    (b"\xff\xff\xff\xff", "an Arrow stream", "In Python: datasets.Dataset.from_file(FILE).to_json(NEW)."),
    (b"ORC", "an ORC file", PARQUET.replace("read_parquet", "read_orc")),
    (b"Obj\x01", "an Avro file", "Export it as JSON lines."),
    (b"%PDF", "a PDF", "Copy the requests into a text file, one a line."),
    (b"\xd0\xcf\x11\xe0", "an old Office file (.xls, .doc)", "Save the sheet as CSV (UTF-8)."),
    (b"BZh", "a bzip2 archive", "Unpack it: bunzip2 FILE."),
    (b"\xfd7zXZ\x00", "an xz archive", "Unpack it: unxz FILE."),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "Unpack it: unzstd FILE."),
    (b"\x04\x22\x4d\x18", "an lz4 archive", "Unpack it: unlz4 FILE."),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!", "a RAR archive", UNPACK),
    (b"\x1f\x9d", "a compress archive (.Z)", UNPACK),
    (b"SQLite format 3\x00", "an SQLite database", "Export the table as CSV."),
    (b"\x93NUMPY", "a NumPy array", "Write the texts one a line."),
    (b"\x89HDF", "an HDF5 file", "Export the table as CSV."),
    ((b"\x89PNG", b"\xff\xd8\xff", b"GIF8"), "a picture", "Give text."),
    (b"\x7fELF", "a program", "Give text."),
    ((b"\x80\x03", b"\x80\x04", b"\x80\x05", b"(lp0\n", b"(dp0\n"), "a Python pickle", "Write JSON lines."),
    (b"{\\rtf", "an RTF document", "Save it as plain text."),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "Fetch the file: git lfs pull."),
    (b"/annex/objects/", "a git-annex pointer, not the file itself", "Fetch the file: git annex get."),
    (b"%!PS", "a PostScript file", "Copy the requests into a text file, one a line."),
    (b"-----BEGIN ", "a key, a certificate or a signed message", "Give the text alone."),
    (b"!<arch>", "an archive of programs", UNPACK),
    (b"07070", "a cpio archive", UNPACK),
    (b"404: Not Found", "an answer of a server (404), not the file", "Fetch the file itself, from where it lies now."),
    (b"Entry not found", "an answer of a server, not the file", "Fetch the file itself, from where it lies now."),
)
PAGE = re.compile(rb"\s*(?:<!doctype\s+html|<html|<\?xml|<head|<body|<svg)", re.IGNORECASE)
SEVEN_BITS = (  # what ASCII bytes are where they spell other text
    (re.compile(rb"\x1b(?:\$[@AB(]|\([BJI])"), "ISO-2022-JP",
     "Save it as UTF-8: iconv -f ISO-2022-JP -t UTF-8 FILE > NEW"),
    (re.compile(rb"~\{[!-~]{2,}~\}"), "HZ (Chinese in 7 bits)", "Save it as UTF-8: iconv -f HZ -t UTF-8 FILE > NEW"),
    (re.compile(rb"\A(?=[^\r\n]{60})(?=.*?[A-Z])(?=.*?[a-z])(?=.*?[\d+/])[A-Za-z0-9+/=\r\n]+\Z"), "base64",
     "Decode it: base64 -d FILE > NEW"),
    (re.compile(rb"=[CDE][0-9A-F]=[89AB][0-9A-F]"), "quoted-printable (a mail's text)", "Save the text, not the mail"),
)  # fmt: skip
FIRST_BYTES = 4096  # in which they show
COLOURS = re.compile("\x1b\\[[0-9;?]*[A-Za-z]")
LATER_MARK = re.compile("(?<=[\r\n])\ufeff+")  # files with marks, one behind the other: `cat a b`
TWICE = re.compile(
    "[\u00c2-\u00f4][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]"
)
MARKS = (  # the longer mark first: UTF-32's begins with UTF-16's
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # no text has them; tab, line ends, form feed and ESC may stand
PLAIN_SIGNS = re.compile("[ \n\r\t.,?!0-9A-Za-z]")


def text_of(data: bytes, where: str) -> tuple[str, str]:
    """(text, how it was read: "" for UTF-8). Errors: CaiError of one line, beginning with `where`."""
    how = []
    if data.startswith(b"\x1f\x8b"):
        data = _gunzip(data, where)
        how.append("gzip")
        if data.startswith(b"\x1f\x8b"):
            raise CaiError(f"{where}: a gzip inside a gzip. Unpack it: gunzip.")
    _refuse_binary(data, where)
    for mark, encoding in MARKS:
        if data.startswith(mark):
            text = _marked(data[len(mark) :], encoding, where)
            how.append(encoding.upper()[:6])
            break
    else:
        text, encoding = _unmarked(data, where)
        how += [encoding] if encoding else []
    text = LATER_MARK.sub("", text.rstrip("\x1a"))  # DOS's end of a file
    _refuse_twice(text, where)
    if found := CONTROL.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise CaiError(
            f"{where}: line {line}: holds the control character U+{ord(found[0]):04X}. Save it as UTF-8 text."
        )
    return text, " in ".join(reversed(how))


def _gunzip(data: bytes, where: str) -> bytes:
    parts, size, rest = [], 0, data
    while rest.startswith(b"\x1f\x8b"):  # members one after the other, as `cat a.gz b.gz` makes them
        unpack = zlib.decompressobj(wbits=31)
        try:
            part = unpack.decompress(rest, MOST_BYTES - size + 1)
        except zlib.error as error:
            raise CaiError(f"{where}: a damaged gzip ({error}). Pack it again, or give it unpacked.") from None
        size += len(part)
        if size > MOST_BYTES:
            raise CaiError(f"{where}: a gzip of more than {MOST_BYTES >> 20} MB. Give a smaller file.")
        if not unpack.eof:
            raise CaiError(f"{where}: a gzip that is cut off. Fetch or pack it again.")
        parts.append(part)
        rest = unpack.unused_data.lstrip(b"\0")
    if rest:
        raise CaiError(f"{where}: a gzip with other bytes behind its end. Pack it again, or give it unpacked.")
    return b"".join(parts)


def _refuse_binary(data: bytes, where: str) -> None:
    if data.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        kinds = {
            b"xl/": ("an Excel workbook", "Save the sheet as CSV (UTF-8)."),
            b"word/": ("a Word document", "Save it as plain text, one request a line."),
            b"opendocument": ("an OpenDocument file", "Save the sheet as CSV (UTF-8), a text as plain text."),
        }
        kind, cure = next((kinds[name] for name in kinds if name in data), ("a zip archive", UNPACK))
        raise CaiError(f"{where}: {kind}. {cure}")
    for first, kind, cure in SIGNATURES:
        if data.startswith(first):
            raise CaiError(f"{where}: {kind}. {cure}")
    if b"\n%PDF-" in b"\n" + data[:1024].removeprefix(b"\xef\xbb\xbf"):
        raise CaiError(f"{where}: a PDF. Copy the requests into a text file, one a line.")
    if data[:FIRST_BYTES].isascii():
        for signs, kind, cure in SEVEN_BITS:
            if signs.search(data[:FIRST_BYTES]):
                raise CaiError(f"{where}: {kind}, not plain text. {cure}.")
    if data[257:262] == b"ustar":
        raise CaiError(f"{where}: a tar archive. {UNPACK}")
    if PAGE.match(data.removeprefix(b"\xef\xbb\xbf")):
        raise CaiError(f"{where}: an HTML or XML page. Download the file itself (the raw link), or write one a line.")


def _refuse_twice(text: str, where: str) -> None:
    """Text that was UTF-8, read as Windows-1252 and saved once more ("TÃ¼r"); colours of a terminal."""
    if colour := COLOURS.search(text):
        line = text.count("\n", 0, colour.start()) + 1
        raise CaiError(f"{where}: line {line}: holds the colours of a terminal (ESC[). Save it without them.")
    if not TWICE.search(text):
        return
    try:
        meant = text.encode("cp1252").decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):
        return
    found = TWICE.search(text)
    place = found.start() if found else 0
    line = text.count("\n", 0, place) + 1
    shown = text[max(0, place - 8) : place + 8].strip().splitlines()[0]
    raise CaiError(
        f"{where}: line {line}: {shown!r}: UTF-8 that was read as Windows-1252 and saved once more "
        f"({len(text) - len(meant)} signs too many). Mend it: iconv -f UTF-8 -t WINDOWS-1252 FILE > NEW"
    )


def _marked(data: bytes, encoding: str, where: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise CaiError(f"{where}: damaged {encoding.upper()} at byte {error.start}. Save it as UTF-8.") from None


def _unmarked(data: bytes, where: str) -> tuple[str, str]:
    """UTF-8, or UTF-16 without a mark where only one byte order makes text of it."""
    if b"\0" in data and (found := _utf16(data)):
        return found
    try:
        return data.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        byte, line = data[error.start], data.count(b"\n", 0, error.start) + 1
        shown = bytes([byte]).decode("cp1252", "replace")
        meant = f" (0x{byte:02X}: {shown!r} in Windows-1252)" if shown.isprintable() and shown != "\ufffd" else ""
        cure = "Save it as UTF-8: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW" if meant else "Save it as UTF-8"
        raise CaiError(f"{where}: not UTF-8 at byte {error.start}, line {line}{meant}. {cure}.") from None


def _utf16(data: bytes) -> tuple[str, str] | None:
    found = {}
    for encoding in ("utf-16-le", "utf-16-be"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if not CONTROL.search(text) and not any(unicodedata.category(sign) in ("Cn", "Co") for sign in set(text)):
            found[encoding] = (len(PLAIN_SIGNS.findall(text)), text)
    ranked = sorted(found.values(), reverse=True)
    if not ranked or not ranked[0][0] or (len(ranked) > 1 and ranked[0][0] < 4 * ranked[1][0]):
        return None
    return ranked[0][1], "UTF-16"
