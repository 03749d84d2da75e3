"""Operations of the decoder, one a file, each with its torch reference. Imports torch only and knows nothing of megaxelm.

Errors here are `ValueError`: the callers know which field of the user's the value came from.
"""
