"""The command line: autopar compile, show and verify.
Must not be imported by the rest of the package.
"""
