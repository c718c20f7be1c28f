"""/burn/N, /wait/N: synchronous."""

from flask import Flask, request

import burning

app = Flask(__name__)


@app.route("/burn/<int:number>", methods=["GET", "POST"])
@app.route("/wait/<int:number>", methods=["GET", "POST"])
def burn(number):
    request.get_data()
    return "done", 200, burning.at_once(number)
