"""/burn/N, /wait/N: synchronous."""

from flask import Flask

import burning

app = Flask(__name__)


@app.get("/burn/<int:number>")
@app.get("/wait/<int:number>")
def burn(number):
    return "done", 200, burning.at_once(number)
