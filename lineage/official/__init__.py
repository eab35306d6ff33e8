"""Official code and published checkpoints, one module a system.

    <key>.py     key map, verifier (outputs that `lineage verify` compares) and `import_weights`
    verify.py    reads reference files and compares
    importing.py turns published checkpoints into run folders

Modules are found by name: a new system adds a file and touches no other.
"""
