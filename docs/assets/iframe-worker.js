// Browsers refuse workers on pages that are opened from disk. The search runs its worker's script in a hidden frame then.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.body.appendChild(document.createElement("iframe"))
      this.frame.hidden = true
      const scope = this.frame.contentWindow
      scope.document.open()
      scope.document.write("<body></body>")
      scope.document.close()
      scope.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = scope.document.createElement("script")
      this.ready = new Promise(resolve => (script.onload = resolve))
      script.src = url
      scope.document.body.append(script)
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {
      this.frame.remove()
    }
  }
