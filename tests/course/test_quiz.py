"""The quiz of all modules in one file, which replaces nothing but itself."""

from miniflamingo.course import quiz, timings


def test_every_module_s_questions_are_in_one_file_that_is_its_own(tmp_path, capsys):
    assert quiz.main(["--out", str(tmp_path)]) == 0
    text = (tmp_path / "quiz.md").read_text("utf-8")
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles == [timings.describe(path).title for path in timings.sources()]
    assert text.count("<summary>Answer</summary>") == 3 * len(titles)
    assert quiz.main(["06", "--out", str(tmp_path)]) == 0
    (tmp_path / "quiz.md").write_text("a teacher's own", "utf-8")
    assert quiz.main(["--out", str(tmp_path)]) == 2
    assert (tmp_path / "quiz.md").read_text("utf-8") == "a teacher's own"
    assert "quiz.md" in capsys.readouterr().err
