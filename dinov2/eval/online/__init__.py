"""What the teacher is measured by while it learns (`evaluation.tasks`): one file one evaluator."""
