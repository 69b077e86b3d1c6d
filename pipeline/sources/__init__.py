"""Where text (`text`) and models (`models`) come from, pinned by content (`content`) when the plan is made.

Local files by SHA-256, S3 objects by ETag and size, hub repositories by commit. A spurious "changed" is acceptable, a
spurious "same" never.
"""
