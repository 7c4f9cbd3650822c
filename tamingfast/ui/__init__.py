"""The page of `tamingfast ui`: the workflows of `tamingfast.tasks` for people, in a browser.

`studio` and its neighbours are what the buttons do, without a web server; `page` lays them out with Gradio, an optional
package, and `server` serves the page.
"""
