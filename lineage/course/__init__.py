"""What the notebooks use: the checks of their exercises, and their pictures.

    check.NAME(answer)     say whether an answer is right, or what is wrong with it, in one sentence
    begin                  the first line of each notebook: where it runs, and how long it takes
    show, film, source     pictures in a row, the film of a sampling, decisive lines of the package
    watch                  pictures that appear while a system trains
    slider                 a picture that follows a slider, with a still one for readers on the web

`lineage grade` and `lineage course` are in `grading` and `handout`.
"""

from lineage.course.checking import check
from lineage.course.display import begin, film, show, slider, source, watch

__all__ = ["begin", "check", "film", "show", "slider", "source", "watch"]
