"""Files that users bring: bytes -> requests, or one line that says why not and what to do.

`input_files` reads them, once; `decoding`: bytes -> text; `jsontext`, `delimited` and `plain`: text -> entries;
`frames`: the marks around a request; `entries`: an entry -> a request and its pool; `instructionfile`: which of them a
file is; `told`: what is said about it.
Invariant: what is not understood is refused, never taken as text.
"""
