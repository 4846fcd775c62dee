"""File names that are allowed but have a special meaning for some library."""

import os

ODD = (
    "run[1]",
    "lr=[0.1,0.2]",
    "a*b",
    "q?",
    "{x,y}",
    "50%41",
    "$HOME",
    "h#x",
    "a&b;c|d<e>`f`!",
    "it's",
    'say "x"',
    "back\\slash",
    "two\nlines",
    "tab\tx",
    " spaces ",
    "-dash",
    "dots..",
    "a:b",
    "a@3",
    "x[0:5]",
    "gs:",
    "~",
    "e\u0301é日本",
    os.fsdecode(b"\xff\xe9"),
)
