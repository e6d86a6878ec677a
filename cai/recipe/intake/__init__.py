"""Files that users bring: bytes -> requests, or one line that says why not and what to do.

`files` reads them, once; `text`: bytes -> text; `jsontext`, `tables` and `plain`: text -> entries; `entries`: an
entry -> a request and its pool; `instructionfile`: which of them a file is; `told`: what is said about it.
Invariant: what is not understood is refused, never taken as text.
"""
