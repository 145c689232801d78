"""SASRec as other packages have it, each in a process and an environment of its own, beside ours."""
