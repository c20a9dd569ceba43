_C_API: object  # a PyCapsule: include/kvmexit/embed.h
