"""Wrong answers to the exercises of `00_the_map`: the exercise, its code, words of the sentence."""

WRONG = [
    (
        "all_ancestors",
        """
def all_ancestors(catalog, key):
    return set(catalog[key].builds_on)
""",
        "stops at what 'ink' builds on directly",
    ),
    (
        "all_ancestors",
        """
def all_ancestors(catalog, key):
    found = {key}
    for parent in catalog[key].builds_on:
        found |= all_ancestors(catalog, parent)
    return found
""",
        "among its own ancestors",
    ),
    (
        "all_ancestors",
        """
def all_ancestors(catalog, key):
    found = set()
    while catalog[key].builds_on:
        key = catalog[key].builds_on[0]
        found.add(key)
    return found
""",
        "follows only the first",
    ),
    (
        "all_ancestors",
        """
def all_ancestors(catalog, key):
    found = []
    for parent in catalog[key].builds_on:
        found += [parent, *all_ancestors(catalog, parent)]
    return found
""",
        "twice: a set holds each once",
    ),
    (
        "all_ancestors",
        """
def all_ancestors(catalog, key):
    return {other for other, row in catalog.items() if key in row.builds_on}
""",
        "returns the descendants of 'sketch'",
    ),
    (
        "most_built_on",
        """
def most_built_on(catalog):
    counts = dict.fromkeys(catalog, 0)
    for row in catalog.values():
        for parent in row.builds_on:
            counts[parent] += 1
    return max(counts, key=counts.get)
""",
        "name directly",
    ),
    (
        "most_built_on",
        """
def most_built_on(catalog):
    def ancestors(key):
        found = set(catalog[key].builds_on)
        for parent in catalog[key].builds_on:
            found |= ancestors(parent)
        return found
    return max(catalog, key=lambda key: len(ancestors(key)))
""",
        "descendants are asked for",
    ),
    (
        "most_built_on",
        """
def most_built_on(catalog):
    return catalog["sketch" if "sketch" in catalog else "clip"]
""",
        "is no key of the catalogue",
    ),
    (
        "most_built_on",
        """
def most_built_on(catalog):
    def grows_from(key, parent):
        return any(p == parent or grows_from(p, parent) for p in catalog[key].builds_on)
    counts = {one: sum(grows_from(key, one) for key in catalog) for one in catalog}
    return sorted(catalog, key=counts.get)[-1]
""",
        "is not the oldest of them",
    ),
    (
        "longest_line",
        """
def longest_line(catalog, key):
    line = [key]
    while catalog[line[0]].builds_on:
        line.insert(0, catalog[line[0]].builds_on[0])
    return line
""",
        "follows only the first",
    ),
    (
        "longest_line",
        """
def longest_line(catalog, key):
    lines = [longest_line(catalog, parent) for parent in catalog[key].builds_on]
    return [key, *max(lines, key=len, default=[])]
""",
        "the oldest comes first",
    ),
    (
        "longest_line",
        """
def longest_line(catalog, key):
    lines = [longest_line(catalog, parent) for parent in catalog[key].builds_on]
    return [*min(lines, key=len, default=[]), key]
""",
        "and there is one of",
    ),
    (
        "longest_line",
        """
def longest_line(catalog, key):
    found = set()
    waiting = [key]
    while waiting:
        one = waiting.pop()
        found.add(one)
        waiting += catalog[one].builds_on
    return [one for one in catalog if one in found]
""",
        "which does not build on it",
    ),
]
