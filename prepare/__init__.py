# A package, so that `import prepare` in benchmarks/ does not find benchmarks/prepare.py
