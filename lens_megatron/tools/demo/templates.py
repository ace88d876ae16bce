"""Lists the words of the demo task: problem templates, distractors and the names that fill them. It holds only data.

A template is a tuple of sentences, the last of which is the question; `{a} {b} {c}` are its numbers in the order of
its operations, `{name} {other}` two people and `{obj}` a plural noun. A distractor never changes the answer: it speaks
of something else, of somebody else (`{third}`) or of another time.
"""

NAMES = (
    *("Tom", "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate"),
    *("Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Yusuf", "Zoe"),
)

OBJECTS = (
    *("apples", "books", "cards", "coins", "cookies", "cups", "eggs", "flowers", "keys", "lemons", "marbles", "nuts"),
    *("oranges", "pears", "pencils", "photos", "plates", "ribbons", "rings", "shells", "stamps", "stones", "toys"),
)

TEMPLATES = {
    "add": (
        ("{name} has {a} {obj}.", "{name} buys {b} more {obj}.", "How many {obj} does {name} have now?"),
        ("There are {a} {obj} on the table.", "{name} puts {b} more {obj} there.", "How many {obj} are there now?"),
        ("{name} has {a} {obj}.", "{other} has {b} {obj}.", "How many {obj} do {name} and {other} have together?"),
        ("{name} found {a} {obj} and then {b} more {obj}.", "How many {obj} did {name} find?"),
    ),
    "sub": (
        ("{name} has {a} {obj}.", "{name} gives {b} {obj} to {other}.", "How many {obj} does {name} have left?"),
        ("There are {a} {obj} in the box.", "{name} takes {b} of them.", "How many {obj} are left in the box?"),
        ("{name} had {a} {obj}.", "{name} lost {b} of them.", "How many {obj} does {name} have left?"),
        ("{name} has {a} {obj}.", "{other} has {b} {obj}.", "How many more {obj} does {name} have than {other}?"),
    ),
    "mul": (
        ("{name} has {a} bags.", "Each bag holds {b} {obj}.", "How many {obj} are in the bags?"),
        ("{name} buys {a} boxes with {b} {obj} in each box.", "How many {obj} does {name} buy?"),
        ("{name} has {a} friends.", "Each friend gets {b} {obj} from {name}.", "How many {obj} does {name} give?"),
    ),
    "add_sub": (
        (
            "{name} has {a} {obj}.",
            "{name} buys {b} more {obj}.",
            "{name} gives {c} {obj} to {other}.",
            "How many {obj} does {name} have left?",
        ),
        (
            "There are {a} {obj} in the box.",
            "{name} puts {b} more {obj} there.",
            "{other} takes {c} of them.",
            "How many {obj} are left in the box?",
        ),
    ),
    "sub_add": (
        (
            "{name} had {a} {obj}.",
            "{name} lost {b} of them.",
            "{other} gives {name} {c} {obj}.",
            "How many {obj} does {name} have now?",
        ),
    ),
    "mul_add": (
        (
            "{name} has {a} bags.",
            "Each bag holds {b} {obj}.",
            "{name} finds {c} more {obj}.",
            "How many {obj} does {name} have now?",
        ),
    ),
    "mul_sub": (
        (
            "{name} buys {a} boxes with {b} {obj} in each box.",
            "{name} gives {c} {obj} to {other}.",
            "How many {obj} does {name} have left?",
        ),
    ),
}
"""Maps operations to templates. The name spells the operations in order: `mul_sub` is a * b - c."""

CLAUSES = (
    "{name} is {n} years old.",
    "{third} is {n} years old.",
    "{third} has {n} cats.",
    "{third} found {n} {obj} last year.",
    "{third} saw {n} birds.",
    "{name} walked {n} miles.",
    "{name} lives at number {n}.",
    "The shop opens at {n}.",
    "The room has {n} chairs.",
    "The bus number is {n}.",
    "It is {n} degrees outside.",
    "The road is {n} miles long.",
)
"""Distractors that are whole sentences; they go before any sentence of the problem."""

SHORTS = (
    " (see page {n})",
    " (note {n})",
    " (item {n})",
    " ({n})",
    " [{n}]",
    " #{n}",
    " as usual",
    " today",
    " really",
    " of course",
)
"""Distractors of a few tokens; they go right after a person or an object inside a sentence."""
