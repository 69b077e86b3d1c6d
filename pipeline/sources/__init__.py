"""Where text (`files`) and models (`models`) come from, pinned by content (`content`) when the plan is made; and how
text is cut into parts (`text`) and splits (`splits`) and read (`text`, `fields`).

Local files by SHA-256, S3 objects by ETag and size, hub repositories by commit. A spurious "changed" is acceptable, a
spurious "same" never.
"""
